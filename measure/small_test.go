// SPDX-License-Identifier: Apache-2.0

package measure_test

import (
	"fmt"
	"testing"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/measure"
	"github.com/dstack-go/dstack/measure/measuretest"
)

// A document gives the registers of small VMs that the files themselves give.
func TestDocumentsKnowTheKernelOfSmallMemories(t *testing.T) {
	l := measuretest.Launch()
	raw, err := measure.TDXDocument(l)
	if err != nil {
		t.Fatal(err)
	}
	d, err := measure.ParseTDXDocument(raw)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, mib := range []uint64{512, 768, 1024, 1536, 2048, 4096} {
		t.Run(fmt.Sprint(mib, " MiB"), func(t *testing.T) {
			l.MemoryBytes = mib << 20
			want, err := measure.ComputeTDX(l)
			if err != nil {
				t.Fatal(err)
			}
			got, err := d.TDX(mib<<20, false)
			if err != nil {
				t.Fatal(err)
			}
			if got.RTMR1 != want.RTMR1 || got.RTMR2 != want.RTMR2 || got.MRTD != want.MRTD {
				t.Errorf("RTMR1 %x, the files give %x", got.RTMR1, want.RTMR1)
			}
			seen[fmt.Sprint(got.RTMR1)] = true
		})
	}
	if len(seen) < 5 {
		t.Errorf("%d different kernels for six sizes", len(seen))
	}
	if _, err := d.TDX(1000<<20, false); fault.Code(err) != "memory_not_constant" {
		t.Errorf("a size between: %v", err)
	}
	again, err := d.Marshal()
	if err != nil || string(again) != string(raw) {
		t.Errorf("the document does not come back: %v", err)
	}
}
