// SPDX-License-Identifier: Apache-2.0

package lograte

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func TestThreat_K08_AFloodOfOneMessageIsCutAndCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		log := slog.New(New(slog.NewTextHandler(&out, nil), 10, 20))
		derived := log.With("a", 1).WithGroup("g")
		for range 1000 {
			log.Info("connection refused", "remote", "192.0.2.1")
			derived.Info("connection refused")
		}
		log.Info("admin", "who", "operator")
		if n := strings.Count(out.String(), "connection refused"); n != 20 {
			t.Errorf("%d lines of the flood", n)
		}
		if !strings.Contains(out.String(), "msg=admin") {
			t.Error("the flood hid another message")
		}
		time.Sleep(time.Second)
		out.Reset()
		log.Info("connection refused")
		log.Info("connection refused")
		first, rest, _ := strings.Cut(out.String(), "\n")
		if !strings.Contains(first, "suppressed=1980") || strings.Contains(rest, "suppressed") || !strings.Contains(rest, "connection refused") {
			t.Errorf("%q", out.String())
		}
	})
}

func TestMessagesWithoutEndShareARate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		h := New(slog.NewTextHandler(&out, nil), 1, 1).(*handler)
		log := slog.New(h)
		for n := range 10 * maxMessages {
			log.Info(fmt.Sprintf("message %d", n))
		}
		if len(h.limits.each) > maxMessages+1 {
			t.Errorf("%d messages are remembered", len(h.limits.each))
		}
		if n := strings.Count(out.String(), "\n"); n != maxMessages+1 {
			t.Errorf("%d lines", n)
		}
	})
}
