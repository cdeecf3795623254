// SPDX-License-Identifier: Apache-2.0

// Command sealedapp is the app of the sealed-storage tests: it does what it is asked
// over HTTP, from inside a container of a confidential VM, and tells what it sees.
//
//	GET /env?name=N           value of its own environment variable
//	GET /put?name=N&value=V   write a file of its volume, durable when answered
//	GET /get?name=N           read it
//	GET /key?path=P           ask dstack.sock for a key
//	GET /dial?addr=A          connect by TCP: "reached", or why not and after how long
//	POST /scan                body: a secret; the processes and files of the machine
//	                          that show it (needs the machine's /proc at /guest/proc,
//	                          privileged)
package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"
)

const (
	data      = "/data"
	guestProc = "/guest/proc"
)

func main() {
	// Each start leaves a line, so that a test can count how often it ran.
	if name := os.Getenv("COUNT_AS"); name != "" {
		f, err := os.OpenFile(filepath.Join(data, name), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err == nil {
			fmt.Fprintln(f, "started")
			err = f.Sync()
			f.Close()
		}
		if err != nil {
			log.Fatal(err)
		}
	}
	http.HandleFunc("/env", func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, os.Getenv(r.FormValue("name")))
	})
	http.HandleFunc("/put", func(w http.ResponseWriter, r *http.Request) {
		answer(w, nil, put(filepath.Join(data, filepath.Base(r.FormValue("name"))), r.FormValue("value")))
	})
	http.HandleFunc("/get", func(w http.ResponseWriter, r *http.Request) {
		text, err := os.ReadFile(filepath.Join(data, filepath.Base(r.FormValue("name"))))
		answer(w, text, err)
	})
	http.HandleFunc("/key", func(w http.ResponseWriter, r *http.Request) {
		text, err := getKey(r.Context(), r.FormValue("path"))
		answer(w, text, err)
	})
	http.HandleFunc("/dial", func(w http.ResponseWriter, r *http.Request) {
		began := time.Now()
		c, err := net.DialTimeout("tcp", r.FormValue("addr"), 10*time.Second)
		if err != nil {
			fmt.Fprintf(w, "%v after %v", err, time.Since(began))
			return
		}
		c.Close()
		io.WriteString(w, "reached")
	})
	http.HandleFunc("/scan", func(w http.ResponseWriter, r *http.Request) {
		secret, err := io.ReadAll(io.LimitReader(r.Body, 1<<10))
		if err == nil && len(secret) < 8 {
			err = fmt.Errorf("a secret of %d bytes is found anywhere", len(secret))
		}
		var found []string
		if err == nil {
			found, err = scan(secret)
		}
		text, _ := json.Marshal(found)
		answer(w, text, err)
	})
	server := &http.Server{Addr: ":8080", ReadHeaderTimeout: 10 * time.Second}
	log.Fatal(server.ListenAndServe())
}

func answer(w http.ResponseWriter, text []byte, err error) {
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	w.Write(text)
}

func put(path, value string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteString(value); err != nil {
		return err
	}
	return f.Sync()
}

// getKey asks as a client of upstream's would.
func getKey(ctx context.Context, path string) ([]byte, error) {
	client := &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			var d net.Dialer
			return d.DialContext(ctx, "unix", "/var/run/dstack.sock")
		},
	}}
	body, err := json.Marshal(map[string]string{"path": path})
	if err != nil {
		return nil, err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://dstack/GetKey", bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	return io.ReadAll(io.LimitReader(resp.Body, 1<<20))
}

// scan looks for a secret where other processes of the machine could: in argument
// lists and environments, and in small files of the guest's own memory file
// systems. It names what holds it, and files for keys that others may read.
func scan(secret []byte) ([]string, error) {
	var found []string
	procs, err := filepath.Glob(guestProc + "/[0-9]*")
	if err != nil {
		return nil, err
	}
	if _, err := os.Stat(guestProc + "/1/root/usr/lib/os-release"); err != nil {
		return nil, fmt.Errorf("the machine's first process is out of sight: %w", err)
	}
	for _, dir := range procs {
		comm, _ := os.ReadFile(dir + "/comm")
		for _, name := range []string{"cmdline", "environ"} {
			text, err := os.ReadFile(filepath.Join(dir, name))
			if err == nil && bytes.Contains(text, secret) {
				found = append(found, fmt.Sprintf("%s of %s", name, strings.TrimSpace(string(comm))))
			}
		}
	}
	for _, root := range []string{"run", "dstack", "tmp", "etc", "root"} {
		base := guestProc + "/1/root/" + root
		err := filepath.WalkDir(base, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return nil
			}
			info, err := d.Info()
			if err != nil || info.Size() > 4<<20 {
				return nil
			}
			text, err := os.ReadFile(path)
			if err != nil {
				return nil
			}
			if bytes.Contains(text, secret) {
				who := "root's"
				if public(base, path) {
					who = "public"
				}
				found = append(found, who+" file "+strings.TrimPrefix(path, guestProc+"/1/root"))
			}
			return nil
		})
		if err != nil {
			return nil, err
		}
	}
	return found, nil
}

// public reports whether another user than root could read a file below base: by its
// own mode and that of every directory above it.
func public(base, path string) bool {
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm()&0o004 == 0 {
		return false
	}
	for dir := filepath.Dir(path); len(dir) >= len(base); dir = filepath.Dir(dir) {
		if info, err := os.Stat(dir); err != nil || info.Mode().Perm()&0o001 == 0 {
			return false
		}
	}
	return true
}
