// SPDX-License-Identifier: Apache-2.0

// Package testkit finds what tests read from outside the module: the shared
// test vectors that lie beside the checkout.
package testkit

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

// Root returns the directory of the module.
func Root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// VectorPath returns the path of one shared vector, such as
// "attestation/tdx/quote-report.json", and skips the test when the vectors do
// not lie beside the checkout.
func VectorPath(t testing.TB, name string) string {
	t.Helper()
	path := filepath.Join(Root(), "..", "shared", "vectors", filepath.FromSlash(name))
	if _, err := os.Stat(path); err != nil {
		t.Skipf("SKIP: test vector %s is not beside the checkout (%v)", name, err)
	}
	return path
}

// Vectors returns the content of one shared vector, or skips the test.
func Vectors(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(VectorPath(t, name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}
