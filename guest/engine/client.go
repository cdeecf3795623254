// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// apiVersion is the Engine API version spoken: the oldest that dockerd 29 accepts.
const apiVersion = "v1.44"

// maxReply bounds one JSON reply of the engine in bytes.
const maxReply = 8 << 20

// Client speaks the part of the Docker Engine API that the guest needs.
type Client struct{ http *http.Client }

// NewClient returns a client of the engine that listens on the unix socket.
func NewClient(socket string) *Client {
	return &Client{&http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		MaxIdleConns: 4, IdleConnTimeout: 30 * time.Second,
	}}}
}

// Error is a refusal by the engine.
type Error struct {
	Status  int
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("engine: %s (status %d)", e.Message, e.Status) }

// NotFound reports whether err says that the engine has no such object.
func NotFound(err error) bool {
	var e *Error
	return errors.As(err, &e) && e.Status == http.StatusNotFound
}

// do sends a request without a body; a status of 300 or more is an error.
func (c *Client) do(ctx context.Context, method, path string, query url.Values) (*http.Response, error) {
	return c.send(ctx, method, path, query, nil)
}

// send sends a request, with body as JSON unless it is nil.
func (c *Client) send(ctx context.Context, method, path string, query url.Values, body any) (*http.Response, error) {
	u := url.URL{Scheme: "http", Host: "docker", Path: "/" + apiVersion + path, RawQuery: query.Encode()}
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return nil, err
		}
		content = bytes.NewReader(text)
	}
	req, err := http.NewRequestWithContext(ctx, method, u.String(), content)
	if err != nil {
		return nil, err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode < 300 {
		return resp, nil
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 4<<10))
	var wire struct{ Message string }
	if json.Unmarshal(text, &wire) != nil || wire.Message == "" {
		wire.Message = strings.TrimSpace(string(text))
	}
	return nil, &Error{resp.StatusCode, wire.Message}
}

func (c *Client) json(ctx context.Context, method, path string, query url.Values, v any) error {
	resp, err := c.do(ctx, method, path, query)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if v == nil {
		_, err = io.Copy(io.Discard, io.LimitReader(resp.Body, maxReply))
		return err
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxReply)).Decode(v); err != nil {
		return fmt.Errorf("engine: reply to %s: %w", path, err)
	}
	return nil
}

// Ping returns nil once the engine answers.
func (c *Client) Ping(ctx context.Context) error {
	return c.json(ctx, http.MethodGet, "/_ping", nil, nil)
}

// Pull fetches an image by reference. progress, which may be nil, is told of each
// status line.
func (c *Client) Pull(ctx context.Context, ref string, progress func(string)) error {
	resp, err := c.do(ctx, http.MethodPost, "/images/create", url.Values{"fromImage": {ref}})
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	for dec := json.NewDecoder(resp.Body); ; {
		var line struct {
			ID, Status, Error string
		}
		if err := dec.Decode(&line); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("engine: progress of pulling %s: %w", ref, err)
		}
		if line.Error != "" {
			return fmt.Errorf("pull %s: %s", ref, line.Error)
		}
		if progress != nil {
			progress(strings.TrimSpace(line.ID + " " + line.Status))
		}
	}
}

// Image is what the engine knows of an image.
type Image struct {
	ID          string   `json:"Id"` // with the containerd store: digest of manifest or index
	RepoDigests []string `json:"RepoDigests"`
}

// Image looks an image up by reference.
func (c *Client) Image(ctx context.Context, ref string) (*Image, error) {
	var img Image
	if err := c.json(ctx, http.MethodGet, "/images/"+ref+"/json", nil, &img); err != nil {
		return nil, err
	}
	return &img, nil
}

// Tag gives the image the name repo:tag.
func (c *Client) Tag(ctx context.Context, ref, repo, tag string) error {
	return c.json(ctx, http.MethodPost, "/images/"+ref+"/tag", url.Values{"repo": {repo}, "tag": {tag}}, nil)
}

// Container is one container in a list.
type Container struct {
	ID      string `json:"Id"`
	Names   []string
	Image   string
	ImageID string
	Created int64
	State   string
	Status  string
	Labels  map[string]string
}

// Containers lists all containers, running or not.
func (c *Client) Containers(ctx context.Context) ([]Container, error) {
	var list []Container
	err := c.json(ctx, http.MethodGet, "/containers/json", url.Values{"all": {"true"}}, &list)
	return list, err
}

// Stop stops a container, killing it after grace.
func (c *Client) Stop(ctx context.Context, id string, grace time.Duration) error {
	return c.json(ctx, http.MethodPost, "/containers/"+id+"/stop",
		url.Values{"t": {strconv.Itoa(int(grace.Seconds()))}}, nil)
}

// Remove kills and removes a container, and its anonymous volumes with it: nothing
// can find them again. Named volumes stay.
func (c *Client) Remove(ctx context.Context, id string) error {
	return c.json(ctx, http.MethodDelete, "/containers/"+id, url.Values{"force": {"true"}, "v": {"true"}}, nil)
}

// StartContainer starts a container; one that runs already is left as it is.
func (c *Client) StartContainer(ctx context.Context, id string) error {
	return c.json(ctx, http.MethodPost, "/containers/"+id+"/start", nil, nil)
}

// SetRestartPolicy changes the restart policy of a container and nothing else.
func (c *Client) SetRestartPolicy(ctx context.Context, id string, p RestartPolicy) error {
	resp, err := c.send(ctx, http.MethodPost, "/containers/"+id+"/update", nil, map[string]any{"RestartPolicy": p})
	if err != nil {
		return err
	}
	return resp.Body.Close()
}

// Images lists the images of the store.
func (c *Client) Images(ctx context.Context) ([]Image, error) {
	var list []Image
	err := c.json(ctx, http.MethodGet, "/images/json", nil, &list)
	return list, err
}

// RemoveImage removes an image under all its names.
func (c *Client) RemoveImage(ctx context.Context, id string) error {
	return c.json(ctx, http.MethodDelete, "/images/"+id, url.Values{"force": {"true"}}, nil)
}

// Logs returns the end of a container's output, at most lines lines and max bytes,
// with both streams joined.
func (c *Client) Logs(ctx context.Context, id string, lines, max int) (string, error) {
	resp, err := c.do(ctx, http.MethodGet, "/containers/"+id+"/logs",
		url.Values{"stdout": {"true"}, "stderr": {"true"}, "tail": {strconv.Itoa(lines)}})
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(resp.Body, int64(max)))
	return demux(data), err
}

// demux strips the 8-byte frame headers (stream, 3 zero bytes, u32 big-endian
// length) of a log without a terminal; text without them is returned as it is.
func demux(data []byte) string {
	var out bytes.Buffer
	rest := data
	for len(rest) >= 8 && rest[0] <= 2 && rest[1] == 0 && rest[2] == 0 && rest[3] == 0 {
		n := int(rest[4])<<24 | int(rest[5])<<16 | int(rest[6])<<8 | int(rest[7])
		rest = rest[8:]
		n = min(n, len(rest))
		out.Write(rest[:n])
		rest = rest[n:]
	}
	if out.Len() == 0 {
		return string(data)
	}
	return out.String()
}
