// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"io"
	"net"
	"net/http"
	"path/filepath"
	"testing"
)

func TestLogStream(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	var asked string
	kind := "application/vnd.docker.multiplexed-stream"
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked = r.URL.String()
		if r.URL.Path == "/v1.44/containers/none/logs" {
			http.Error(w, `{"message":"No such container"}`, http.StatusNotFound)
			return
		}
		w.Header().Set("Content-Type", kind)
		io.WriteString(w, "x")
	})}
	go server.Serve(l)
	t.Cleanup(func() { server.Close() })
	c := NewClient(socket)
	t.Cleanup(c.http.CloseIdleConnections)
	for _, want := range []bool{true, false} {
		stream, framed, err := c.LogStream(t.Context(), "c1", LogOptions{Since: 5, Tail: 3, Follow: true})
		if err != nil {
			t.Fatal(err)
		}
		text, err := io.ReadAll(stream)
		stream.Close()
		if err != nil || string(text) != "x" || framed != want || asked != "/v1.44/containers/c1/logs?follow=true&since=5&stderr=true&stdout=true&tail=3" {
			t.Errorf("%q, framed %v, %v, asked for %s", text, framed, err, asked)
		}
		kind = "application/vnd.docker.raw-stream"
	}
	if _, _, err := c.LogStream(t.Context(), "none", LogOptions{Tail: -1}); !NotFound(err) {
		t.Errorf("an unknown container: %v", err)
	}
}
