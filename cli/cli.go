// SPDX-License-Identifier: Apache-2.0

// Package cli is the user's one tool, `dstack`: its verbs, what they print and
// how they exit.
//
// Every verb takes --json and then prints one JSON document on standard output;
// progress and diagnostics go to standard error. A failure prints what is wrong
// and the fix, with a stable code (docs/errors.md). Exit codes: 0 done, 1 failed
// (verify: refused), 2 wrong usage, 3 verify could not decide.
package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"time"

	"charm.land/lipgloss/v2"
	"github.com/alecthomas/kong"

	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/stack"
)

// Version is the version of this build.
const Version = "0.1.0"

// Exit codes.
const (
	exitOK        = 0
	exitFailed    = 1
	exitUsage     = 2
	exitUndecided = 3
)

type grammar struct {
	State   string           `help:"State directory of the local stack." env:"DSTACK_STATE" placeholder:"DIR"`
	JSON    bool             `name:"json" help:"Print one JSON document on standard output."`
	Version kong.VersionFlag `help:"Print the version and stop."`

	Up     upCmd     `cmd:"" help:"Start the local stack: test PKI, OS image, KMS, VMM."`
	Down   downCmd   `cmd:"" help:"Stop the local stack and its VMs and remove its state."`
	Status statusCmd `cmd:"" help:"Show the local stack."`

	Deploy  deployCmd  `cmd:"" help:"Run a docker-compose.yaml in a confidential VM."`
	Upgrade upgradeCmd `cmd:"" help:"Replace what an app runs; its id, keys and data disk stay."`
	Resize  resizeCmd  `cmd:"" help:"Make an app's data disk larger."`
	Ps      psCmd      `cmd:"" help:"List the apps."`
	Logs    logsCmd    `cmd:"" help:"Show an app's console."`
	Events  eventsCmd  `cmd:"" help:"Show what happened to an app, also to one that was removed."`
	Info    infoCmd    `cmd:"" help:"Show one app in full."`
	Stop    stopCmd    `cmd:"" help:"Stop an app."`
	Start   startCmd   `cmd:"" help:"Start a stopped app."`
	Rm      rmCmd      `cmd:"" help:"Remove an app and its disk."`

	App appCmd `cmd:"" help:"Say which apps get keys of the stack's KMSs."`
	KMS kmsCmd `cmd:"" name:"kms" help:"Look at the stack's KMSs, their policy and their release logs."`

	Council councilCmd `cmd:"" help:"Own contracts on a chain together: m of n accounts propose, sign and submit calls."`

	Gateway gatewayCmd `cmd:"" help:"Look at a gateway and change what it does: routes, domains, certificates, members."`

	Chain chainCmd `cmd:"" help:"Run a chain for development, with the governance contracts on it."`

	Image  imageCmd  `cmd:"" help:"Build, list and check OS images."`
	Volume volumeCmd `cmd:"" help:"Make read-only volumes of data for apps."`

	Measure   measureCmd   `cmd:"" help:"Compute what a TEE will measure of an OS image on a VM of a given shape."`
	Verify    verifyCmd    `cmd:"" help:"Check what runs at a URL, or in saved evidence."`
	Simulator simulatorCmd `cmd:"" help:"Be the guest agent of an app under development, on this machine."`

	Doctor doctorCmd `cmd:"" help:"Check this machine and say how to fix what is wrong."`
}

// ui is where a verb reads and writes. Its methods may be called concurrently.
type ui struct {
	in   io.Reader
	out  io.Writer // results
	err  io.Writer // progress
	json bool
	tty  bool

	mu sync.Mutex
}

var (
	dim   = lipgloss.NewStyle().Faint(true)
	bold  = lipgloss.NewStyle().Bold(true)
	green = lipgloss.NewStyle().Foreground(lipgloss.Color("2"))
	red   = lipgloss.NewStyle().Foreground(lipgloss.Color("1"))
	amber = lipgloss.NewStyle().Foreground(lipgloss.Color("3"))
)

func (u *ui) paint(s lipgloss.Style, text string) string {
	if !u.tty {
		return text
	}
	return s.Render(text)
}

// step prints one line of progress.
func (u *ui) step(format string, args ...any) {
	u.mu.Lock()
	defer u.mu.Unlock()
	fmt.Fprintf(u.err, "%s %s\n", u.paint(green, "•"), fmt.Sprintf(format, args...))
}

// printf prints to the result stream, unless JSON is wanted there.
func (u *ui) printf(format string, args ...any) {
	if u.json {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	fmt.Fprintf(u.out, format, args...)
}

// result prints v when JSON is wanted.
func (u *ui) result(v any) error {
	if !u.json {
		return nil
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	enc := json.NewEncoder(u.out)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}

// exitError ends the program with a code; whatever was to be said is said.
type exitError int

func (e exitError) Error() string { return fmt.Sprintf("exit %d", int(e)) }

// app is what kong binds into every verb's Run.
type app struct {
	*ui
	ctx   context.Context
	stack *stack.Stack
}

// Main runs the tool and returns its exit code.
func Main(args []string, in io.Reader, out, errOut io.Writer) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()

	var g grammar
	exit := -1
	parser, err := kong.New(&g,
		kong.Name("dstack"),
		kong.Description("Run a docker-compose.yaml, unchanged, in a confidential VM on a machine you need not trust, and let anyone check it."),
		kong.Vars{"version": "dstack " + Version},
		kong.Writers(out, errOut),
		kong.Exit(func(code int) { exit = code; panic(exitError(code)) }),
		kong.ConfigureHelp(kong.HelpOptions{Compact: true}),
	)
	if err != nil {
		fmt.Fprintln(errOut, "dstack:", err)
		return exitUsage
	}
	kctx, err := parse(parser, args)
	if exit >= 0 {
		return exit
	}
	if err != nil {
		fmt.Fprintf(errOut, "dstack: %v\n  fix: see `dstack --help`\n", err)
		return exitUsage
	}
	u := &ui{in: in, out: out, err: errOut, json: g.JSON, tty: isTerminal(errOut)}
	dir := g.State
	if dir == "" {
		dir = stack.DefaultDir()
	}
	st, err := stack.Open(dir)
	if err == nil {
		err = kctx.Run(&app{ui: u, ctx: ctx, stack: st})
	}
	return u.report(err)
}

// parse turns kong's early exits (help, version) into plain returns.
func parse(parser *kong.Kong, args []string) (ctx *kong.Context, err error) {
	defer func() {
		if r := recover(); r != nil {
			if _, ok := r.(exitError); !ok {
				panic(r)
			}
		}
	}()
	return parser.Parse(args)
}

// report prints an error for people or programs and returns the exit code.
func (u *ui) report(err error) int {
	if err == nil {
		return exitOK
	}
	var ee exitError
	if errors.As(err, &ee) {
		return int(ee)
	}
	code, fix := fault.Code(err), fault.Fix(err)
	if code == "" {
		code = "internal"
	}
	if u.json {
		_ = u.result(map[string]any{"error": err.Error(), "code": code, "fix": fix})
	}
	fmt.Fprintf(u.err, "%s %v %s\n", u.paint(red, "error:"), err, u.paint(dim, "["+code+"]"))
	if fix != "" {
		fmt.Fprintf(u.err, "  %s %s\n", u.paint(bold, "fix:"), fix)
	}
	if code == "usage" {
		return exitUsage
	}
	return exitFailed
}

func isTerminal(w io.Writer) bool {
	f, ok := w.(*os.File)
	if !ok || os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb" {
		return false
	}
	st, err := f.Stat()
	return err == nil && st.Mode()&os.ModeCharDevice != 0
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.1f s", d.Seconds()) }
