// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/dstack-go/dstack"
	"github.com/dstack-go/dstack/channel"
)

func TestAnInvitationEnds(t *testing.T) {
	c := alone(t, t.TempDir())
	at := time.Now()
	for name, x := range map[string]struct {
		invite invite
		code   string
	}{
		"lasts":           {invite{Until: at.Add(time.Minute).Unix()}, ""},
		"has ended":       {invite{Until: at.Add(-time.Minute).Unix()}, "cluster_uninvited"},
		"used by itself":  {invite{Until: at.Add(time.Minute).Unix(), By: "x"}, ""},
		"used by another": {invite{Until: at.Add(time.Minute).Unix(), By: "y"}, "cluster_uninvited"},
	} {
		text, err := json.Marshal(x.invite)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Put(t.Context(), inviteKey(name), text, 0); err != nil {
			t.Fatal(err)
		}
		wantCode(t, c.use(t.Context(), name, "x"), x.code)
	}
	wantCode(t, c.use(t.Context(), "lasts", "y"), "cluster_uninvited") // x spent it
	// What has ended is tidied away, what was used before its end is not.
	c.prune(t.Context())
	if left, err := c.List(t.Context(), invitePrefix); err != nil || len(left) != 3 {
		t.Errorf("%d invitations are left: %v", len(left), err)
	}
}

// A connection's evidence counts for an hour: a member that keeps one open shows itself anew.
func TestAConnectionsEvidenceGrowsOld(t *testing.T) {
	c := alone(t, t.TempDir())
	peer := func(instance dstack.InstanceID, age time.Duration) *channel.Peer {
		p := &channel.Peer{At: time.Now().Add(-age)}
		p.Identity.InstanceID = &instance
		return p
	}
	own := c.Node().Instance
	n, err := c.memberOf(t.Context(), peer(own, longest))
	if err != nil || n.Instance != own {
		t.Errorf("%v %v", n, err)
	}
	_, err = c.memberOf(t.Context(), peer(own, longest+2*time.Minute))
	wantCode(t, err, "cluster_evidence_old")
	_, err = c.memberOf(t.Context(), peer(dstack.InstanceID{9}, 0))
	wantCode(t, err, "cluster_stranger")
}
