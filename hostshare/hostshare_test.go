// SPDX-License-Identifier: Apache-2.0

package hostshare

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/dstack-go/dstack/internal/fault"
)

func minimal() Files {
	return Files{AppComposeName: []byte(`{"name":"x"}`), SysConfigName: []byte(`{}`)}
}

func full() Files {
	return Files{
		AppComposeName:   bytes.Repeat([]byte("c"), 513),
		SysConfigName:    []byte(`{"kms_urls":[]}`),
		InstanceInfoName: []byte(`{}`),
		EncryptedEnvName: bytes.Repeat([]byte{0}, 1024),
		UserConfigName:   {},
	}
}

func equal(a, b Files) bool { return maps.EqualFunc(a, b, bytes.Equal) }

func mustWrite(t testing.TB, f Files) []byte {
	t.Helper()
	data, err := Write(f)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestWriteThenReadGivesTheSameFiles(t *testing.T) {
	largest := minimal()
	largest[AppComposeName] = make([]byte, 10<<20)
	for name, files := range map[string]Files{"minimal": minimal(), "full": full(), "largest": largest} {
		data := mustWrite(t, files)
		if len(data)%512 != 0 {
			t.Errorf("%s: length %d is not a multiple of 512", name, len(data))
		}
		for rname, r := range map[string]io.Reader{
			"whole":         bytes.NewReader(data),
			"padded disk":   io.MultiReader(bytes.NewReader(data), bytes.NewReader(make([]byte, 1<<20))),
			"short reads":   iotest.HalfReader(bytes.NewReader(data)),
			"error at data": iotest.DataErrReader(bytes.NewReader(data)),
		} {
			got, err := Read(r)
			if err != nil || !equal(got, files) {
				t.Errorf("%s, %s: %v, %v", name, rname, slices.Sorted(maps.Keys(got)), err)
			}
		}
		if again := mustWrite(t, files); !bytes.Equal(data, again) {
			t.Errorf("%s: two writes differ", name)
		}
	}
}

// Our archives are USTAR to others, and theirs are to us.
func TestInteroperatesWithOtherTars(t *testing.T) {
	files := full()
	tr := tar.NewReader(bytes.NewReader(mustWrite(t, files)))
	got := Files{}
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Format != tar.FormatUSTAR || h.Mode != 0o444 {
			t.Errorf("%s: format %v, mode %o", h.Name, h.Format, h.Mode)
		}
		got[h.Name], _ = io.ReadAll(tr)
	}
	if !equal(got, files) {
		t.Error("archive/tar reads other files than were written")
	}

	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("SKIP: no tar command on this machine")
	}
	dir := t.TempDir()
	args := []string{"--format=ustar", "-cf", "-", "-C", dir}
	for name, data := range files {
		if err := writeFile(filepath.Join(dir, name), data); err != nil {
			t.Fatal(err)
		}
		args = append(args, name)
	}
	out, err := exec.Command("tar", args...).Output()
	if err != nil {
		t.Fatal(err)
	}
	if got, err := Read(bytes.NewReader(out)); err != nil || !equal(got, files) {
		t.Errorf("reading tar's archive: %v", err)
	}
}

// archive builds archives that Write would not.
func archive(t testing.TB, headers ...any) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		switch h := h.(type) {
		case *tar.Header:
			if h.Typeflag == 0 {
				h.Typeflag = tar.TypeReg
			}
			if err := w.WriteHeader(h); err != nil {
				t.Fatal(err)
			}
		case []byte:
			if _, err := w.Write(h); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func withMinimal(t testing.TB, headers ...any) []byte {
	all := []any{}
	for _, name := range []string{AppComposeName, SysConfigName} {
		data := minimal()[name]
		all = append(all, &tar.Header{Name: name, Size: int64(len(data)), Mode: 0o444}, data)
	}
	return archive(t, append(all, headers...)...)
}

// patch changes the first header and mends its checksum.
func patch(data []byte, off int, with string) []byte {
	data = bytes.Clone(data)
	copy(data[off:], with)
	var h [block]byte
	copy(h[:], data)
	copy(data[offChecksum:], fmt.Sprintf("%06o\x00 ", checksum(&h)))
	return data
}

func TestReadRefuses(t *testing.T) {
	good := mustWrite(t, minimal())
	badSum := bytes.Clone(good)
	badSum[offMtime]++
	dirtyPadding := bytes.Clone(good)
	dirtyPadding[block+20] = 1
	for name, c := range map[string]struct {
		data []byte
		code string
	}{
		"an empty disk":                     {nil, "shared_truncated"},
		"a blank disk":                      {make([]byte, 4096), "shared_missing"},
		"an archive without manifest":       {archive(t, &tar.Header{Name: SysConfigName}), "shared_missing"},
		"an archive without sys-config":     {archive(t, &tar.Header{Name: AppComposeName}), "shared_missing"},
		"an unknown name":                   {withMinimal(t, &tar.Header{Name: "extra"}), "shared_unknown_file"},
		"a trust anchor of the simulator":   {withMinimal(t, &tar.Header{Name: ".tee-simulator.json"}), "shared_unknown_file"},
		"a name with a directory":           {withMinimal(t, &tar.Header{Name: "./" + UserConfigName}), "shared_unknown_file"},
		"a name that climbs":                {withMinimal(t, &tar.Header{Name: "../" + UserConfigName}), "shared_unknown_file"},
		"a name of other case":              {withMinimal(t, &tar.Header{Name: ".User-Config"}), "shared_unknown_file"},
		"a name with a prefix":              {patch(good, offPrefix, "etc"), "shared_unknown_file"},
		"bytes after the name's end":        {patch(good, len(AppComposeName)+1, "x"), "shared_unknown_file"},
		"a name twice":                      {withMinimal(t, &tar.Header{Name: AppComposeName}), "shared_duplicate_file"},
		"a symbolic link":                   {withMinimal(t, &tar.Header{Name: UserConfigName, Typeflag: tar.TypeSymlink, Linkname: "/proc/kcore"}), "shared_not_regular"},
		"a hard link":                       {withMinimal(t, &tar.Header{Name: UserConfigName, Typeflag: tar.TypeLink, Linkname: AppComposeName}), "shared_not_regular"},
		"a FIFO":                            {withMinimal(t, &tar.Header{Name: UserConfigName, Typeflag: tar.TypeFifo}), "shared_not_regular"},
		"a device":                          {withMinimal(t, &tar.Header{Name: UserConfigName, Typeflag: tar.TypeBlock}), "shared_not_regular"},
		"a directory":                       {withMinimal(t, &tar.Header{Name: UserConfigName + "/", Typeflag: tar.TypeDir}), "shared_unknown_file"},
		"a regular file with a link target": {patch(good, offLink, "x"), "shared_not_regular"},
		"an extended header":                {withMinimal(t, &tar.Header{Name: UserConfigName, Format: tar.FormatPAX, PAXRecords: map[string]string{"a.b": "c"}}), "shared_unknown_file"},
		"a GNU archive":                     {withMinimal(t, &tar.Header{Name: UserConfigName, Format: tar.FormatGNU}), "shared_malformed"},
		"a wrong checksum":                  {badSum, "shared_malformed"},
		"a binary size":                     {patch(good, offSize, "\x80\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x01"), "shared_malformed"},
		"a negative size":                   {patch(good, offSize, "-0000000001\x00"), "shared_malformed"},
		"a size without an end":             {patch(good, offSize, "000000000010"), "shared_malformed"},
		"a size over the limit":             {patch(good, offSize, "00050000001\x00"), "shared_file_too_large"},
		"a sparse 8 GiB file":               {patch(good, offSize, "77777777777\x00"), "shared_file_too_large"},
		"a size beyond the end of the disk": {patch(good, offSize, "00040000000\x00"), "shared_truncated"},
		"non-zero padding":                  {dirtyPadding, "shared_malformed"},
		"garbage":                           {bytes.Repeat([]byte("garbage!"), 512), "shared_malformed"},
		"only one zero block at the end":    {good[:len(good)-512], "shared_truncated"},
		"an archive cut in a header":        {good[:100], "shared_truncated"},
		"an archive cut in a file":          {good[:block+3], "shared_truncated"},
		"data in the second end block":      {append(bytes.Clone(good[:len(good)-1]), 1), "shared_trailing_data"},
		"data after the end":                {append(append(bytes.Clone(good), make([]byte, 5000)...), 1), "shared_trailing_data"},
		"a second archive":                  {append(bytes.Clone(good), good...), "shared_trailing_data"},
		"a disk that is too large":          {append(bytes.Clone(good), make([]byte, MaxSize)...), "shared_too_large"},
		"a disk one byte too large":         {append(bytes.Clone(good), make([]byte, MaxSize+1-len(good))...), "shared_too_large"},
	} {
		if _, err := Read(bytes.NewReader(c.data)); fault.Code(err) != c.code {
			t.Errorf("%s: error %v (code %q), want code %s", name, err, fault.Code(err), c.code)
		}
	}
	if _, err := Read(bytes.NewReader(append(bytes.Clone(good), make([]byte, MaxSize-len(good))...))); err != nil {
		t.Errorf("a disk of exactly the limit: %v", err)
	}
}

func TestReadPassesOnErrorsOfTheDisk(t *testing.T) {
	broken := errors.New("I/O error")
	good := mustWrite(t, minimal())
	for _, n := range []int{0, 100, 600, len(good)} {
		if _, err := Read(io.MultiReader(bytes.NewReader(good[:n]), iotest.ErrReader(broken))); !errors.Is(err, broken) {
			t.Errorf("after %d bytes: %v", n, err)
		}
	}
}

func TestWriteRefusesWhatReadWould(t *testing.T) {
	for code, change := range map[string]func(Files){
		"shared_unknown_file":   func(f Files) { f[".appkeys.json"] = nil },
		"shared_missing":        func(f Files) { delete(f, SysConfigName) },
		"shared_file_too_large": func(f Files) { f[InstanceInfoName] = make([]byte, 10<<10+1) },
	} {
		f := minimal()
		change(f)
		if _, err := Write(f); fault.Code(err) != code {
			t.Errorf("error %v, want code %s", err, code)
		}
	}
}

// Every single-byte change of the first header or the end is refused, or changes
// only what is documented as ignored.
func TestEveryByteOfTheStructureCounts(t *testing.T) {
	files := minimal()
	good := mustWrite(t, files)
	for off := range good {
		bad := bytes.Clone(good)
		bad[off] ^= 0x10
		got, err := Read(bytes.NewReader(bad))
		if err == nil && equal(got, files) {
			t.Errorf("a changed byte at %d went unnoticed", off)
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(mustWrite(f, minimal()))
	f.Add(mustWrite(f, full()))
	f.Add(withMinimal(f, &tar.Header{Name: UserConfigName, Typeflag: tar.TypeSymlink, Linkname: "x"}))
	f.Add(make([]byte, 1024))
	f.Fuzz(func(t *testing.T, data []byte) {
		files, err := Read(bytes.NewReader(data))
		if err != nil {
			return
		}
		again, err := Read(bytes.NewReader(mustWrite(t, files)))
		if err != nil || !equal(files, again) {
			t.Fatalf("accepted files do not survive Write and Read: %v", err)
		}
	})
}

// Random archives of random files round-trip; the seed is printed on failure.
func TestRandomFilesRoundTrip(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for range 50 {
		files := minimal()
		for _, e := range entries {
			if rng.IntN(2) == 0 {
				data := make([]byte, rng.IntN(2000))
				for i := range data {
					data[i] = byte(rng.Uint32())
				}
				files[e.name] = data
			}
		}
		if got, err := Read(bytes.NewReader(mustWrite(t, files))); err != nil || !equal(got, files) {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func TestErrorsNameTheFileAndThePlace(t *testing.T) {
	_, err := Read(bytes.NewReader(withMinimal(t, &tar.Header{Name: UserConfigName, Typeflag: tar.TypeFifo})))
	if err == nil || !strings.Contains(err.Error(), UserConfigName) || !strings.Contains(err.Error(), "at byte 2048") {
		t.Errorf("error %v", err)
	}
}
