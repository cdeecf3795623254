// SPDX-License-Identifier: Apache-2.0

package api_test

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/dstack-go/dstack/api/agent"
	"github.com/dstack-go/dstack/api/gateway"
	"github.com/dstack-go/dstack/api/guestapi"
	"github.com/dstack-go/dstack/api/hostapi"
	"github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/api/vmm"
)

var update = flag.Bool("update", false, "write testdata/wire.txt anew")

// TestWireIsUpstreams pins every method, field, number and type. A difference in a
// line that exists breaks upstream's clients; new lines are for fields of our own.
func TestWireIsUpstreams(t *testing.T) {
	var b strings.Builder
	for _, f := range []protoreflect.FileDescriptor{vmm.File_vmm_vmm_proto, hostapi.File_hostapi_hostapi_proto,
		guestapi.File_guestapi_guestapi_proto, agent.File_agent_agent_proto, kms.File_kms_kms_proto, gateway.File_gateway_gateway_proto} {
		for i := range f.Services().Len() {
			s := f.Services().Get(i)
			for j := range s.Methods().Len() {
				m := s.Methods().Get(j)
				fmt.Fprintf(&b, "rpc %s.%s %s %s\n", s.FullName(), m.Name(), m.Input().Name(), m.Output().Name())
			}
		}
		for i := range f.Messages().Len() {
			m := f.Messages().Get(i)
			for j := range m.Fields().Len() {
				fd := m.Fields().Get(j)
				kind := fd.Kind().String()
				if fd.Message() != nil {
					kind = string(fd.Message().Name())
				}
				if fd.HasOptionalKeyword() {
					kind = "optional " + kind
				} else if fd.IsList() {
					kind = "repeated " + kind
				}
				fmt.Fprintf(&b, "%s.%s %d %s\n", m.FullName(), fd.Name(), fd.Number(), kind)
			}
		}
	}
	const golden = "testdata/wire.txt"
	if *update {
		if err := os.WriteFile(golden, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(b.String(), "\n")); diff != "" {
		t.Errorf("the wire format changed (-was +is):\n%s", diff)
	}
}

// Upstream's messages are declared in order of their numbers, and JSON output
// follows the declaration.
func TestFieldsAreDeclaredInOrderOfTheirNumbers(t *testing.T) {
	for _, f := range []protoreflect.FileDescriptor{vmm.File_vmm_vmm_proto, hostapi.File_hostapi_hostapi_proto,
		guestapi.File_guestapi_guestapi_proto, agent.File_agent_agent_proto, kms.File_kms_kms_proto, gateway.File_gateway_gateway_proto} {
		for i := range f.Messages().Len() {
			fields := f.Messages().Get(i).Fields()
			for j := 1; j < fields.Len(); j++ {
				if fields.Get(j).Number() < fields.Get(j-1).Number() {
					t.Errorf("%s is declared after %s", fields.Get(j).FullName(), fields.Get(j-1).FullName())
				}
			}
		}
	}
}
