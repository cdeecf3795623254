// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"io"
	"net/http"
	"net/url"
	"strconv"
)

// LogOptions say which part of a container's output is wanted.
type LogOptions struct {
	Since, Until int64 // Unix seconds; 0: no bound
	Tail         int   // lines from the end; negative: all
	Follow       bool
	Timestamps   bool
}

// LogStream opens a container's output, both streams of it. framed says that it has
// the engine's frame headers, as [Client.Logs] describes them; that of a container
// with a terminal has none. The caller closes it; it ends with ctx.
func (c *Client) LogStream(ctx context.Context, id string, opt LogOptions) (stream io.ReadCloser, framed bool, err error) {
	query := url.Values{"stdout": {"true"}, "stderr": {"true"}, "tail": {"all"}}
	if opt.Tail >= 0 {
		query.Set("tail", strconv.Itoa(opt.Tail))
	}
	for name, at := range map[string]int64{"since": opt.Since, "until": opt.Until} {
		if at != 0 {
			query.Set(name, strconv.FormatInt(at, 10))
		}
	}
	for name, on := range map[string]bool{"follow": opt.Follow, "timestamps": opt.Timestamps} {
		if on {
			query.Set(name, "true")
		}
	}
	resp, err := c.do(ctx, http.MethodGet, "/containers/"+url.PathEscape(id)+"/logs", query)
	if err != nil {
		return nil, false, err
	}
	return resp.Body, resp.Header.Get("Content-Type") != "application/vnd.docker.raw-stream", nil
}
