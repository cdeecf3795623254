// SPDX-License-Identifier: Apache-2.0

package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/dstack-go/dstack/internal/process"
)

// gatewayClient is a browser of somebody who trusts the stack's private CA. Names under
// localhost are loopback (RFC 6761 §6.3).
func gatewayClient(t testing.TB) *http.Client {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(shared.state, "gateway", "private-ca.pem"))
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(text)
	return &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: &tls.Config{RootCAs: roots},
		DialContext: func(ctx context.Context, _, addr string) (net.Conn, error) {
			_, port, err := net.SplitHostPort(addr)
			if err != nil {
				return nil, err
			}
			return new(net.Dialer).DialContext(ctx, "tcp", "127.0.0.1:"+port)
		},
	}}
}

// public is the app by its public name: TLS ends in the guest, the verdict is of that very
// connection, and a gateway that is killed is back before anyone gives up.
func (s *sealedApp) public(t *testing.T) {
	client := gatewayClient(t)
	reach := func() error {
		resp, err := client.Get(s.URLs[0] + "/env?name=COUNT_AS")
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		_, err = io.ReadAll(resp.Body)
		return err
	}
	until := func(what string, patience time.Duration, ask func() error) {
		t.Helper()
		for deadline := time.Now().Add(patience); ; time.Sleep(250 * time.Millisecond) {
			err := ask()
			if err == nil {
				return
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s: %v\n%s", what, err, console(t, s.ID))
			}
		}
	}
	if len(s.URLs) == 0 {
		t.Fatalf("deploy told no public name: %+v", s.deployed)
	}
	until("the public name", 60*time.Second, reach)
	v, exit := verify(t, s.URLs[0], "--lock", s.Lock, "--dev-roots", shared.devRoots(), "--policy", filepath.Join(s.dir, "policy.json"))
	if !v.Accepted || exit != 0 {
		t.Errorf("the verdict of the public name: exit %d, %+v", exit, v)
	}
	s.throughTheGateway(t)
	// The same host with another app's id leads nowhere.
	u, err := url.Parse(s.URLs[0])
	if err != nil {
		t.Fatal(err)
	}
	if resp, err := client.Get("https://" + strings.Repeat("0", 40) + u.Host[40:] + "/"); err == nil {
		resp.Body.Close()
		t.Error("an app that nobody deployed answers")
	}

	// What an operator asks by the stack's own socket: a port that he closes leads nowhere
	// until he opens it, whoever ends TLS there.
	var routes struct {
		Hosts []struct {
			App      string `json:"app_id"`
			Instance string `json:"instance_id"`
		}
	}
	if err := json.Unmarshal([]byte(dstack(t, "--json", "gateway", "routes").must(t).stdout), &routes); err != nil {
		t.Fatal(err)
	}
	instance := ""
	for _, h := range routes.Hosts {
		if h.App == u.Host[:40] {
			instance = h.Instance
		}
	}
	dstack(t, "gateway", "policy", "set", instance).must(t)
	until("a port that the operator closed", 10*time.Second, func() error {
		if reach() == nil {
			return errors.New("it is open")
		}
		return nil
	})
	dstack(t, "gateway", "policy", "clear", instance).must(t)
	until("a port that is open again", 10*time.Second, reach)

	// One probe a second, as a user would come, while the gateway is killed and comes back.
	time.Sleep(3 * time.Second) // it keeps its routes every two
	text, err := os.ReadFile(filepath.Join(shared.state, "gateway.pid"))
	if err != nil {
		t.Fatal(err)
	}
	var id process.ID
	if err := json.Unmarshal(text, &id); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(id.PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	dstack(t, "up", "--image", shared.imageDir()).must(t)
	until("after the gateway was killed", 60*time.Second, reach)
	gap := time.Since(began)
	t.Logf("a gateway that is killed leaves its apps unreachable for %s", gap.Round(100*time.Millisecond))
	if gap > 10*time.Second {
		t.Errorf("the gap is %s, more than 10 s", gap)
	}
}

// throughTheGateway verifies by the name of a port whose TLS ends at the gateway: both are
// in the verdict, and the gateway is the one that the app's manifest names.
func (s *sealedApp) throughTheGateway(t *testing.T) {
	args := []string{s.URLs[1], "--lock", s.Lock, "--dev-roots", shared.devRoots(), "--policy", filepath.Join(s.dir, "policy.json")}
	v, exit := verify(t, append(args, "--allow-gateway-termination")...)
	if !v.Accepted || exit != 0 || v.Channel != "gateway" || len(v.Hops) != 2 || v.Hops[0].Role != "gateway" || !v.Hops[0].Accepted {
		t.Errorf("the verdict of a name whose TLS ends at the gateway: exit %d, %+v", exit, v)
	}
	v, exit = verify(t, args...)
	wantRefused(t, v, exit, "gateway_termination_denied")
}
