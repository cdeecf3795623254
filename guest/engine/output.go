// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// OutputOptions say which part of a container's output is wanted.
type OutputOptions struct {
	Since, Until int64 // Unix seconds; 0: no bound
	Tail         int   // lines from the end; negative: all
	Follow       bool
	Timestamps   bool
}

// rawStream is the type of output that has no frames: that of a terminal.
const rawStream = "application/vnd.docker.raw-stream"

// Output opens the output of a container, by name or id. framed says that it comes in
// the engine's frames: a byte for the channel, three zeros, the length in four bytes,
// big-endian, then as many bytes. The caller closes the stream.
func (c *Client) Output(ctx context.Context, id string, o OutputOptions) (stream io.ReadCloser, framed bool, err error) {
	query := url.Values{"stdout": {"1"}, "stderr": {"1"}, "tail": {"all"}}
	if o.Tail >= 0 {
		query.Set("tail", strconv.Itoa(o.Tail))
	}
	for name, v := range map[string]int64{"since": o.Since, "until": o.Until} {
		if v != 0 {
			query.Set(name, strconv.FormatInt(v, 10))
		}
	}
	for name, on := range map[string]bool{"follow": o.Follow, "timestamps": o.Timestamps} {
		if on {
			query.Set(name, "1")
		}
	}
	resp, err := c.do(ctx, http.MethodGet, "/containers/"+id+"/logs", query)
	if err != nil {
		return nil, false, fmt.Errorf("open the output of container %s: %w", id, err)
	}
	return resp.Body, resp.Header.Get("Content-Type") != rawStream, nil
}
