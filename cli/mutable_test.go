// SPDX-License-Identifier: Apache-2.0

package cli

import (
	"strings"
	"testing"
)

// A compose file whose containers could change what runs is deployed only by name,
// and said aloud then too.
func TestThreat_J02_DeployRefusesWhatCouldChange(t *testing.T) {
	d := newDesk(t)
	for code, more := range map[string]string{
		"compose_docker_socket": "    volumes: [\"/var/run/docker.sock:/s\"]\n",
		"compose_privileged":    "    privileged: true\n",
		"compose_host_pid":      "    pid: host\n",
	} {
		c := d.file("m.yaml", composeFile(more))
		d.refused(code, "deploy", "-c", c, "-n", "m")
		if o := d.must("deploy", "-c", c, "-n", "m", "--allow-mutable", "--dry-run"); !strings.Contains(o.out+o.err, code) {
			t.Errorf("%s is not said:\n%s%s", code, o.out, o.err)
		}
	}
	if d.created != nil {
		t.Error("a VM was made")
	}
}
