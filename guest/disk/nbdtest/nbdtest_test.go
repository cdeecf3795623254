// SPDX-License-Identifier: Apache-2.0

package nbdtest

import (
	"bytes"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestPowerCutKeepsWhatWasFlushedAndSomeOfTheRest(t *testing.T) {
	lost, kept := 0, 0
	for seed := range uint64(64) {
		s := NewStore()
		s.write(0, []byte("first"))
		s.flush()
		s.write(0, []byte("later"))
		s.write(block, []byte("other"))
		s.Cut(rand.New(rand.NewPCG(seed, 0)))
		s.write(2*block, []byte("after"))
		p := make([]byte, 5)
		if s.Read(0, p); string(p) == "later" {
			kept++
		} else if string(p) == "first" {
			lost++
		} else {
			t.Fatalf("block 0 is %q", p)
		}
		if s.Read(2*block, p); !bytes.Equal(p, make([]byte, 5)) {
			t.Fatalf("written without power: %q", p)
		}
		s.Restore()
		s.write(2*block, []byte("again"))
		if s.Read(2*block, p); string(p) != "again" {
			t.Fatalf("after the power is back: %q", p)
		}
	}
	if lost == 0 || kept == 0 {
		t.Errorf("lost %d, kept %d", lost, kept)
	}
}

func TestQEMUReadsAndWrites(t *testing.T) {
	qemuIO, err := exec.LookPath("qemu-io")
	if err != nil {
		t.Skipf("SKIP: %v", err)
	}
	socket := filepath.Join(t.TempDir(), "s")
	server, err := Listen(socket, map[string]int64{"d": 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	store := NewStore()
	if err := server.Attach("d", store); err != nil {
		t.Fatal(err)
	}
	if server.Attach("e", store) == nil {
		t.Error("an export that is not there was attached")
	}
	out, err := exec.Command(qemuIO, "-f", "raw", "-c", "write -P 7 100k 8k", "-c", "flush", "-c", "write -z 104k 4k", "-c", "read -P 7 100k 4k", "-c", "read -P 0 104k 4k",
		"nbd+unix:///d?socket="+socket).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	p := make([]byte, 8<<10)
	store.Read(100<<10, p)
	if !bytes.Equal(p[:4096], bytes.Repeat([]byte{7}, 4096)) || !bytes.Equal(p[4096:], make([]byte, 4096)) {
		t.Error("the store holds something else")
	}
}
