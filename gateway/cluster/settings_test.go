// SPDX-License-Identifier: Apache-2.0

package cluster

import (
	"testing"

	"github.com/dstack-go/dstack/gateway/settings/settingstest"
)

func TestSettingsStore(t *testing.T) { settingstest.Conform(t, alone(t, t.TempDir())) }
