// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/keys"
)

func TestConsoleLinesCannotBeForged(t *testing.T) {
	var b bytes.Buffer
	c := &console{w: &b}
	c.Log("engine: x\ndstack: phase done ok 1ms\x1b[2J\r" + strings.Repeat("y", 5000))
	if n := strings.Count(b.String(), "\n"); n != 1 || !strings.HasPrefix(b.String(), "dstack: engine: x dstack: phase") || b.Len() > maxLine+20 || strings.ContainsRune(b.String(), 0x1b) {
		t.Fatalf("%d lines: %.200q", n, b.String())
	}
}

func TestRation(t *testing.T) {
	r := &ration{n: 2, interval: time.Second}
	now := time.Unix(0, 0)
	passed := 0
	for i := range 100 {
		if ok, _ := r.allow(now.Add(time.Duration(i) * 10 * time.Millisecond)); ok {
			passed++
		}
	}
	if passed != 2 {
		t.Errorf("%d lines passed within a second", passed)
	}
	if ok, dropped := r.allow(now.Add(3 * time.Second)); !ok || dropped != 98 {
		t.Errorf("later: %v, %d dropped", ok, dropped)
	}
}

func TestSecretsAreWiped(t *testing.T) {
	raw := bytes.Repeat([]byte{7}, keys.Size)
	app := new(keys.AppKeys)
	var err error
	if app.Disk, err = keys.NewDiskKey(raw); err != nil {
		t.Fatal(err)
	}
	if app.App, err = keys.NewAppKey(raw); err != nil {
		t.Fatal(err)
	}
	app.Provider.CAKey = []byte{1, 2, 3}
	der := []byte{4, 5, 6}
	s := secrets{app: app, channelKey: der}
	s.Wipe()
	if !app.Disk.IsZero() || !app.App.IsZero() || !bytes.Equal(app.Provider.CAKey, make([]byte, 3)) || !bytes.Equal(der, make([]byte, 3)) || s.channelKey != nil {
		t.Fatalf("left %v %v", app, der)
	}
}
