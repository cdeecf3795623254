// SPDX-License-Identifier: Apache-2.0

package cli_test

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/dstack-go/dstack/cli"
	"github.com/dstack-go/dstack/governance/devchain"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"dstack": func() { os.Exit(cli.Main(os.Args[1:], os.Stdin, os.Stdout, os.Stderr)) },
	})
}

// The verbs as a terminal session: what each says and how it exits without a
// stack. With one, they are tested in package e2e.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(env *testscript.Env) error {
			env.Setenv("DSTACK_STATE", env.WorkDir+"/state")
			env.Setenv("HOME", env.WorkDir+"/home")
			env.Setenv("NO_COLOR", "1")
			return nil
		},
		RequireExplicitExec: true,
	})
}

// The verbs of governance on a real chain.
func TestChainScripts(t *testing.T) {
	if _, err := exec.LookPath("npm"); err != nil {
		t.Skip("npm is not installed: the development chain's node comes from it")
	}
	cache := os.Getenv("DSTACK_CACHE")
	if cache == "" {
		dir, err := os.UserCacheDir()
		if err != nil {
			t.Fatal(err)
		}
		cache = filepath.Join(dir, "dstack")
	}
	testscript.Run(t, testscript.Params{
		Dir: "testdata/chain",
		Setup: func(env *testscript.Env) error {
			state := env.WorkDir + "/state"
			env.Setenv("DSTACK_STATE", state)
			env.Setenv("DSTACK_CACHE", cache)
			env.Setenv("HOME", env.WorkDir+"/home")
			env.Setenv("NO_COLOR", "1")
			for i, c := range []string{"1", "2", "3"} {
				word := ""
				for range 64 {
					word += c
				}
				env.Setenv(fmt.Sprintf("H%d", i+1), word)
			}
			env.Defer(func() {
				if err := devchain.Stop(filepath.Join(state, "chain"), 10*time.Second); err != nil {
					t.Error(err)
				}
			})
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			// field NAME KEY sets a variable from the JSON that was printed last.
			"field": func(ts *testscript.TestScript, neg bool, args []string) {
				var doc map[string]any
				ts.Check(json.Unmarshal([]byte(ts.ReadFile("stdout")), &doc))
				ts.Setenv(args[0], fmt.Sprint(doc[args[1]]))
			},
			// later SECONDS moves the chain's clock.
			"later": func(ts *testscript.TestScript, neg bool, args []string) {
				by, err := time.ParseDuration(args[0])
				ts.Check(err)
				d, err := devchain.Open(filepath.Join(ts.Getenv("DSTACK_STATE"), "chain"))
				ts.Check(err)
				ts.Check(d.Advance(t.Context(), by))
			},
			// wallet FILE makes a key file with ether, whose passphrase is in FILE.pass,
			// and its address $WALLET.
			"wallet": func(ts *testscript.TestScript, neg bool, args []string) {
				d, err := devchain.Open(filepath.Join(ts.Getenv("DSTACK_STATE"), "chain"))
				ts.Check(err)
				at, err := devchain.NewKey(ts.MkAbs(args[0]), ts.MkAbs(args[0]+".pass"))
				ts.Check(err)
				ts.Check(d.Fund(t.Context(), at))
				ts.Setenv("WALLET", at.Hex())
			},
		},
		RequireExplicitExec: true,
	})
}
