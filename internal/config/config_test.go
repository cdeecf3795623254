// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

type testConfig struct {
	Name string `toml:"name"`
	Deep struct {
		Limit Size     `toml:"limit"`
		Wait  Duration `toml:"wait"`
		On    bool     `toml:"on"`
		N     uint32   `toml:"n"`
		Rate  float64  `toml:"rate"`
		List  []string `toml:"list"`
	} `toml:"deep"`
	Tokens []Secret `toml:"tokens"`
}

func load(t *testing.T, text string, environ ...string) (testConfig, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "c.toml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	c := testConfig{Name: "default"}
	return c, Load(&c, path, Env{Prefix: "X_", Environ: environ, Ignore: []string{"URL"}})
}

func TestLaterSourcesWin(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.toml")
	os.WriteFile(path, []byte("name = 'file'\ntokens=['hush']\n[deep]\nlimit = '2G'\nwait = '90s'\nn = 4\n"), 0o600)
	c := testConfig{Name: "default"}
	c.Deep.On = true
	err := Load(&c, path, Env{Prefix: "X_", Ignore: []string{"URL"},
		Environ: []string{"X_DEEP__N=7", "X_DEEP__RATE=2.5", "X_DEEP__LIST=a, b", "X_DEEP__LIMIT=512M", "X_URL=http://somewhere", "OTHER=1"}})
	if err != nil {
		t.Fatal(err)
	}
	if c.Name != "file" || !c.Deep.On || c.Deep.N != 7 || c.Deep.Rate != 2.5 || c.Deep.Limit != 512<<20 ||
		c.Deep.Wait.Duration != 90*time.Second || fmt.Sprint(c.Deep.List) != "[a b]" {
		t.Fatalf("got %+v", c)
	}
	if c.Tokens[0].Reveal() != "hush" {
		t.Fatal("secret lost")
	}
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%x", "%q"} {
		if s := fmt.Sprintf(verb, c); strings.Contains(s, "hush") || strings.Contains(s, "68757368") {
			t.Errorf("%s prints the secret: %s", verb, s)
		}
	}
}

func TestMistakesAreNamed(t *testing.T) {
	for _, tc := range []struct{ name, file, env, code, want string }{
		{"unknown key in the file", "[deep]\nlimitt = 3\n", "", "config_unknown_key", ":2: unknown key deep.limitt"},
		{"unknown table in the file", "[deeep]\nn = 3\n", "", "config_unknown_key", "deeep"},
		{"unknown key in the environment", "", "X_DEEP__NO=1", "config_unknown_key", "deep.no"},
		{"not TOML", "name = \n", "", "config_malformed", ":1:"},
		{"wrong type in the file", "[deep]\non = 3\n", "", "config_malformed", ""},
		{"wrong type in the environment", "", "X_DEEP__ON=maybe", "config_value", "X_DEEP__ON"},
		{"size that does not fit", "", "X_DEEP__LIMIT=99999999999T", "config_value", "size"},
		{"negative duration", "", "X_DEEP__WAIT=-1s", "config_value", "duration"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := load(t, tc.file, tc.env)
			if fault.Code(err) != tc.code || !strings.Contains(err.Error(), tc.want) {
				t.Fatalf("got %q: %v", fault.Code(err), err)
			}
		})
	}
	if err := Load(&testConfig{}, filepath.Join(t.TempDir(), "none.toml"), Env{}); fault.Code(err) != "config_missing" {
		t.Fatal(err)
	}
}

func TestSyntaxErrorDoesNotQuoteASecret(t *testing.T) {
	_, err := load(t, "tokens = 'hush'\n")
	if err == nil || strings.Contains(err.Error(), "hush") {
		t.Fatal(err)
	}
}

func TestSizes(t *testing.T) {
	for text, want := range map[string]Size{"0": 0, "17": 17, "4k": 4096, "1G": 1 << 30, "0x10": 16, "3T": 3 << 40} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err != nil || s != want {
			t.Errorf("%q: %d, %v", text, s, err)
		}
	}
	for _, text := range []string{"", "G", "-1", "1.5G", "1GB", "0x"} {
		var s Size
		if err := s.UnmarshalText([]byte(text)); err == nil {
			t.Errorf("%q accepted", text)
		}
	}
}

func TestSizeAndDurationMayBeIntegers(t *testing.T) {
	c := testConfig{}
	path := filepath.Join(t.TempDir(), "c.toml")
	os.WriteFile(path, []byte("[deep]\nlimit = 4096\nwait = 90\n"), 0o600)
	if err := Load(&c, path, Env{}); err != nil {
		t.Fatal(err)
	}
	if c.Deep.Limit != 4096 || c.Deep.Wait.Duration != 90*time.Second {
		t.Fatalf("got %+v", c)
	}
}

func TestChangedKeysAreNamed(t *testing.T) {
	a, err := load(t, "name = 'file'\ntokens=['hush']\n[deep]\nlimit = '2G'\nlist = ['a']\n")
	if err != nil {
		t.Fatal(err)
	}
	b := a
	if got := Changed(&a, &b); len(got) != 0 {
		t.Errorf("nothing changed: %v", got)
	}
	b.Tokens, b.Deep.List, b.Deep.Wait.Duration, b.Name = []Secret{{}}, []string{"b"}, time.Second, ""
	if got := fmt.Sprint(Changed(&a, &b)); got != "[name deep.wait deep.list tokens]" {
		t.Errorf("got %s", got)
	}
}
