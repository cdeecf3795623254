// SPDX-License-Identifier: Apache-2.0

package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/dstack-go/dstack/internal/fault"
)

// The data disk outlives a boot, and with it every container. A container with a
// restart policy would start with the daemon, before this boot's gates have passed:
// before the scripts ran, and whatever image it was made of (threats.md J04). So:
//
//	gates, err := Disarm(cfg.Data, locked)       // before the daemons start
//	n, err := gates.Sweep(ctx, client, …)        // once the engine answers
//	err = gates.Rearm(ctx, client, project)      // after all gates, before compose up
//	n, err = SweepImages(ctx, client, lock)      // after compose up, with a lock
//
// Volumes and networks stay throughout.

// RestartPolicy is a container's, in the engine's words.
type RestartPolicy struct {
	Name              string
	MaximumRetryCount int
}

func (p RestartPolicy) restarts() bool { return p.Name != "" && p.Name != "no" }

// Gates is what Disarm found.
type Gates struct {
	// Policies are the restart policies taken from containers, by container id.
	Policies map[string]RestartPolicy
	// Removed are entries of the containers' directory that the engine could not
	// have made and that were deleted.
	Removed []string
	// NotStarted are containers outside the project that Rearm could not start, with
	// the reasons. As with the engine itself, that is no reason to end the boot.
	NotStarted []string

	dir      string          // of the containers
	starting map[string]bool // containers that the daemon would have started
}

// Bounds of what an earlier boot left behind.
const (
	maxContainers = 4096
	maxHostConfig = 1 << 20 // bytes
	maxState      = 4 << 20 // bytes
	maxSaved      = 4 << 10 // bytes
)

// Files in the directory of a container. savedPolicy is ours: it keeps the policy
// over a power cut between Disarm and Rearm.
const (
	hostConfigFile = "hostconfig.json"
	stateFile      = "config.v2.json"
	savedPolicy    = "dstack-restart.json"
)

var containerID = regexp.MustCompile(`^[0-9a-f]{64}$`)

// Disarm takes the restart policy from every container below data (the parent of
// docker/), so that none starts with the daemon. The daemon must not be running.
//
// The disk is authenticated, but its content was written by an earlier boot whose
// app may have had the engine's socket: no symbolic link is followed, sizes are
// bounded, and what does not read as the engine writes it is deleted; the engine
// could not have run it either.
//
// locked says that the measured manifest locks images. Then the engine's managed
// plugins and its swarm, which would start containers too, are deleted as well; a
// compose file knows neither. A manifest without a lock keeps them, as upstream.
// Code container_state: the containers of earlier boots cannot be dealt with.
func Disarm(data string, locked bool) (*Gates, error) {
	g := &Gates{Policies: map[string]RestartPolicy{}, starting: map[string]bool{}, dir: filepath.Join(data, "docker/containers")}
	fail := func(err error, what string) (*Gates, error) {
		return nil, fault.Wrap(err, "container_state", "disarm the containers of earlier boots: %s", what)
	}
	top, err := os.OpenRoot(filepath.Join(data, "docker"))
	if errors.Is(err, fs.ErrNotExist) {
		return g, nil
	}
	if err != nil {
		return fail(err, "open the engine's directory")
	}
	defer top.Close()
	if locked {
		for _, name := range []string{"plugins", "swarm"} {
			if err := top.RemoveAll(name); err != nil {
				return fail(err, "remove "+name)
			}
		}
	}
	switch info, err := top.Lstat("containers"); {
	case errors.Is(err, fs.ErrNotExist):
		return g, nil
	case err != nil:
		return fail(err, "look at the containers' directory")
	case !info.IsDir():
		return fail(errors.New("it is no directory"), "look at the containers' directory")
	}
	root, err := top.OpenRoot("containers")
	if err != nil {
		return fail(err, "open the containers' directory")
	}
	defer root.Close()
	dir, err := root.Open(".")
	if err != nil {
		return fail(err, "open the containers' directory")
	}
	entries, err := dir.ReadDir(maxContainers + 1)
	dir.Close()
	if err != nil && !errors.Is(err, io.EOF) {
		return fail(err, "list the containers")
	}
	if len(entries) > maxContainers {
		return fail(fmt.Errorf("there are more than %d", maxContainers), "list the containers")
	}
	for _, entry := range entries {
		id := entry.Name()
		err := errors.New("not a container's directory")
		if entry.IsDir() && containerID.MatchString(id) {
			err = g.disarm(root, id)
		}
		if err == nil {
			continue
		}
		if malformed := new(malformedError); !errors.As(err, &malformed) && entry.IsDir() && containerID.MatchString(id) {
			return fail(err, "container "+id)
		}
		if err := root.RemoveAll(id); err != nil {
			return fail(err, "remove "+id)
		}
		delete(g.Policies, id)
		g.Removed = append(g.Removed, id)
	}
	return g, nil
}

// malformedError is about a file that the engine does not write.
type malformedError struct{ why string }

func (e *malformedError) Error() string { return e.why }

func (g *Gates) disarm(root *os.Root, id string) error {
	dir, err := root.OpenRoot(id)
	if err != nil {
		return err
	}
	defer dir.Close()
	text, err := readPlain(dir, hostConfigFile, maxHostConfig)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // cut short while it was made; without this file it has no policy
	}
	if err != nil {
		return err
	}
	// The engine reads the file with encoding/json, for which names differing in
	// case are one: all of them go.
	var members map[string]json.RawMessage
	if err := json.Unmarshal(text, &members); err != nil {
		return &malformedError{hostConfigFile + ": " + err.Error()}
	}
	var found struct{ RestartPolicy RestartPolicy }
	if err := json.Unmarshal(text, &found); err != nil {
		return &malformedError{hostConfigFile + ": " + err.Error()}
	}
	policy := found.RestartPolicy
	if saved, err := readPlain(dir, savedPolicy, maxSaved); err == nil && !policy.restarts() {
		var p RestartPolicy
		if json.Unmarshal(saved, &p) == nil {
			policy = p
		}
	}
	if !policy.restarts() {
		return nil
	}
	g.Policies[id] = policy
	g.starting[id] = wouldStart(dir, policy)
	if !found.RestartPolicy.restarts() {
		return nil // disarmed by a boot that ended before Rearm
	}
	saved, err := json.Marshal(policy)
	if err != nil {
		return err
	}
	if err := replace(dir, savedPolicy, saved); err != nil {
		return err
	}
	for name := range members {
		if strings.EqualFold(name, "RestartPolicy") {
			delete(members, name)
		}
	}
	members["RestartPolicy"] = json.RawMessage(`{"Name":"no","MaximumRetryCount":0}`)
	if text, err = json.Marshal(members); err != nil {
		return err
	}
	return replace(dir, hostConfigFile, text)
}

// wouldStart says whether the daemon would have started the container on its own.
func wouldStart(dir *os.Root, p RestartPolicy) bool {
	var state struct {
		HasBeenManuallyStopped bool
		State                  struct{ Running bool }
	}
	text, err := readPlain(dir, stateFile, maxState)
	if err != nil || json.Unmarshal(text, &state) != nil {
		return false
	}
	switch p.Name {
	case "always":
		return true
	case "unless-stopped":
		return !state.HasBeenManuallyStopped
	default:
		return state.State.Running
	}
}

// readPlain reads a regular file of at most max bytes, following no link.
func readPlain(dir *os.Root, name string, max int64) ([]byte, error) {
	info, err := dir.Lstat(name)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > max {
		return nil, &malformedError{fmt.Sprintf("%s is no regular file of at most %d bytes", name, max)}
	}
	f, err := dir.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, max+1))
	if err == nil && int64(len(data)) > max {
		err = &malformedError{name + " grew"}
	}
	return data, err
}

// replace writes a file so that a power cut leaves the old content or the new.
func replace(dir *os.Root, name string, data []byte) error {
	temp := "." + name + ".dstack"
	_ = dir.RemoveAll(temp)
	f, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := dir.Rename(temp, name); err != nil {
		return err
	}
	d, err := dir.Open(".")
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// SweepPolicy says which containers of an earlier boot may stay.
type SweepPolicy struct {
	// Locked is set when the measured manifest locks images. Then no container stays
	// but those that compose will make anew (Compose.Fresh): it hands the volumes
	// without a name on from the old container to the new one, and the rest of the old
	// one is gone.
	Locked bool
	// Project and Services name what the compose file has. Without Locked,
	// containers of the project whose service is gone are removed. No Services:
	// none is removed.
	Project  string
	Services []string
}

// Labels that docker compose gives its containers.
const (
	projectLabel = "com.docker.compose.project"
	serviceLabel = "com.docker.compose.service"
	oneOffLabel  = "com.docker.compose.oneoff" // "True": of compose run
)

// Sweep removes the containers that an earlier boot left and the policy does not let
// stay, and says how many. With Locked it then looks again, and fails when one is left
// that should not be, or runs. Code containers_left.
func (g *Gates) Sweep(ctx context.Context, c *Client, p SweepPolicy) (int, error) {
	list, err := c.Containers(ctx)
	if err != nil {
		return 0, fault.Wrap(err, "containers_left", "list the containers of earlier boots")
	}
	removed := 0
	for _, container := range list {
		if p.stays(container) {
			continue
		}
		if err := c.Remove(ctx, container.ID); err != nil && !NotFound(err) {
			return removed, fault.Wrap(err, "containers_left", "remove the container %s of an earlier boot", container.ID)
		}
		delete(g.Policies, container.ID)
		removed++
	}
	if !p.Locked {
		return removed, nil
	}
	if list, err = c.Containers(ctx); err != nil {
		return removed, fault.Wrap(err, "containers_left", "list the containers of earlier boots")
	}
	for _, container := range list {
		if !p.stays(container) || container.State == "running" || container.State == "restarting" {
			return removed, fault.New("containers_left", "the container %s of an earlier boot is still there, %s", container.ID, container.State)
		}
	}
	clear(g.Policies) // compose gives the new ones theirs
	return removed, nil
}

func (p SweepPolicy) stays(c Container) bool {
	mine := c.Labels[projectLabel] == p.Project && slices.Contains(p.Services, c.Labels[serviceLabel])
	if p.Locked {
		return mine && !strings.EqualFold(c.Labels[oneOffLabel], "true")
	}
	orphan := len(p.Services) > 0 && c.Labels[projectLabel] == p.Project && c.Labels[serviceLabel] != "" && !mine
	return !orphan
}

// SweepImages removes the images that the lock (references to digests, as the
// manifest has it) does not name, and says how many. Nothing could have run from
// them: the compose file names locked ones only. Call it when no container of an
// earlier boot is left. Code images_left.
func SweepImages(ctx context.Context, c *Client, lock map[string]string) (int, error) {
	locked := func(i Image) bool {
		return slices.Contains(slices.Collect(maps.Values(lock)), i.ID)
	}
	images, err := c.Images(ctx)
	if err != nil {
		return 0, fault.Wrap(err, "images_left", "list the images of earlier boots")
	}
	removed := 0
	for _, image := range images {
		if locked(image) {
			continue
		}
		if err := c.RemoveImage(ctx, image.ID); err != nil && !NotFound(err) {
			return removed, fault.Wrap(err, "images_left", "remove the image %s, which the lock does not name", image.ID)
		}
		removed++
	}
	if images, err = c.Images(ctx); err != nil {
		return removed, fault.Wrap(err, "images_left", "list the images of earlier boots")
	}
	if i := slices.IndexFunc(images, func(i Image) bool { return !locked(i) }); i >= 0 {
		return removed, fault.New("images_left", "the image %s, which the lock does not name, is still there", images[i].ID)
	}
	return removed, nil
}

// Rearm gives the containers that are left their restart policies back, and starts
// those outside the compose project that the daemon would have started; compose
// starts its own. Call it when every gate has passed. After a Sweep with Locked
// there is nothing to do. It goes through all of them; an error says whose policy
// could not be given back.
func (g *Gates) Rearm(ctx context.Context, c *Client, project string) error {
	if len(g.Policies) == 0 {
		return nil
	}
	list, err := c.Containers(ctx)
	if err != nil {
		return fmt.Errorf("list the containers of earlier boots: %w", err)
	}
	root, err := os.OpenRoot(g.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var errs []error
	for _, container := range list {
		policy, ok := g.Policies[container.ID]
		if !ok {
			continue
		}
		if err := c.SetRestartPolicy(ctx, container.ID, policy); err != nil {
			errs = append(errs, fmt.Errorf("container %s: %w", container.ID, err))
			continue
		}
		if err := root.Remove(filepath.Join(container.ID, savedPolicy)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
		if g.starting[container.ID] && container.Labels[projectLabel] != project {
			if err := c.StartContainer(ctx, container.ID); err != nil {
				g.NotStarted = append(g.NotStarted, fmt.Sprintf("container %s: %v", container.ID, err))
			}
		}
	}
	return errors.Join(errs...)
}
