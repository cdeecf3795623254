// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"regexp"
	"strings"
	"time"

	"github.com/dstack-go/dstack/internal/fault"
)

type eventsCmd struct {
	Name  string `arg:"" help:"App name or VM id; of an app that was removed, the VM id."`
	Since string `help:"Only what is not older, such as 1h or 2026-01-02T15:04:05Z." placeholder:"TIME"`
	Lines int    `short:"n" help:"At most so many, the newest." default:"200"`
	Audit bool   `help:"Who asked for which change, instead of what happened."`
}

var vmID = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)

func (c *eventsCmd) Run(a *app) error {
	q := url.Values{"kind": {"events"}, "limit": {fmt.Sprint(c.Lines)}}
	if c.Audit {
		q.Set("kind", "audit")
	}
	if c.Since != "" {
		at, err := time.Parse(time.RFC3339, c.Since)
		if d, derr := time.ParseDuration(c.Since); derr == nil && d > 0 {
			at, err = time.Now().Add(-d), nil
		}
		if err != nil || at.UnixMilli() < 0 {
			return usage("--since wants a duration such as 1h or a time such as 2026-01-02T15:04:05Z, not %q", c.Since)
		}
		q.Set("since", fmt.Sprint(at.UnixMilli()))
	}
	vm, err := findVM(a, c.Name)
	switch {
	case err == nil:
		q.Set("id", vm.Id)
	case fault.Code(err) == "app_unknown" && vmID.MatchString(c.Name):
		q.Set("id", c.Name)
	default:
		return err
	}
	req, err := http.NewRequestWithContext(a.ctx, http.MethodGet, "http://vmm/history?"+q.Encode(), nil)
	if err != nil {
		return err
	}
	resp, err := a.stack.HTTP().Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		text, _ := io.ReadAll(io.LimitReader(resp.Body, 4096))
		var e struct{ Error, Code, Fix string }
		if json.Unmarshal(text, &e) == nil && e.Code != "" {
			return fault.New(e.Code, "%s", e.Error).WithFix("%s", e.Fix)
		}
		return fault.New("events", "the VMM refused: %s", strings.TrimSpace(string(text)))
	}
	type line struct {
		TimeMS  int64  `json:"time_ms"`
		Event   string `json:"event,omitempty"`
		Body    string `json:"body,omitempty"`
		Who     string `json:"who,omitempty"`
		Method  string `json:"method,omitempty"`
		Outcome string `json:"outcome,omitempty"`
	}
	lines := []line{}
	sc := bufio.NewScanner(resp.Body)
	sc.Buffer(nil, 1<<20)
	for sc.Scan() {
		var l line
		if err := json.Unmarshal(sc.Bytes(), &l); err != nil {
			return fmt.Errorf("read the VMM's answer: %w", err)
		}
		lines = append(lines, l)
		at := time.UnixMilli(l.TimeMS).UTC().Format(time.RFC3339)
		if c.Audit {
			a.printf("%s  %-12s %-20s %s\n", at, printable(l.Method), printable(l.Outcome), printable(l.Who))
		} else {
			a.printf("%s  %-18s %s\n", at, printable(l.Event), printable(l.Body))
		}
	}
	if err := sc.Err(); err != nil {
		return err
	}
	return a.result(lines)
}
