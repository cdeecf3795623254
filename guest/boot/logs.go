// SPDX-License-Identifier: Apache-2.0

package boot

import (
	"context"

	"github.com/dstack-go/dstack/guest/agent/initrpc"
	"github.com/dstack-go/dstack/guest/engine"
	"github.com/dstack-go/dstack/internal/fault"
)

// Logs opens a container's output. Whether anyone may see it is for the agent to
// decide, by the measured manifest.
func (i rpcInit) Logs(ctx context.Context, r initrpc.LogsRequest) (initrpc.Logs, error) {
	e := i.m.runningEngine()
	if e == nil {
		return initrpc.Logs{}, fault.New("engine_not_ready", "the container engine is not up yet")
	}
	stream, framed, err := e.LogStream(ctx, r.Container, engine.LogOptions{
		Since: r.Since, Until: r.Until, Tail: r.Tail, Follow: r.Follow, Timestamps: r.Timestamps,
	})
	if engine.NotFound(err) {
		return initrpc.Logs{}, fault.New("container_unknown", "there is no container of that name")
	}
	if err != nil {
		return initrpc.Logs{}, fault.Wrap(err, "engine_logs", "read what %s wrote", r.Container)
	}
	return initrpc.Logs{Framed: framed, Stream: stream}, nil
}
