// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path"
	"strconv"
	"strings"

	"google.golang.org/protobuf/types/known/emptypb"

	kmsapi "github.com/dstack-go/dstack/api/kms"
	"github.com/dstack-go/dstack/internal/admintoken"
	"github.com/dstack-go/dstack/internal/fault"
	"github.com/dstack-go/dstack/prpc"
)

// serveAdmin serves the administrators' calls on a listener of their own, if that is
// enabled. A name in a request never leaves the cache's directory: it is hexadecimal,
// and what it names is opened below the directory, links that lead out of it excepted
// (threats.md G11).
func (n *Node) serveAdmin() (stop func(), err error) {
	a := n.cfg.Core.Admin
	if !a.Enabled {
		return func() {}, nil
	}
	h, err := n.admin()
	if err != nil {
		return nil, err
	}
	addr := net.JoinHostPort(a.Address, strconv.Itoa(int(a.Port)))
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fault.Wrap(err, "kms_listen", "listen for administrators on %s", addr)
	}
	s := prpc.Server(h)
	s.ErrorLog = slog.NewLogLogger(n.log.Handler(), slog.LevelDebug)
	go s.Serve(l)
	n.log.Info("administrators", "address", l.Addr().String())
	return func() { s.Close() }, nil
}

// admin is the handler; all of it but /health asks for the token.
func (n *Node) admin() (http.Handler, error) {
	g, err := admintoken.New(admintoken.Config{Realm: "dstack-kms admin", Token: n.cfg.Core.Admin.AuthToken})
	if err != nil {
		return nil, err
	}
	calls := g.Handler(prpc.NewMux([]string{"Admin."}, prpc.Unary("ClearImageCache", n.clearImageCache)))
	mux := http.NewServeMux()
	mux.Handle("/prpc/", calls)
	mux.HandleFunc("/health", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "OK") })
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", n.Version)
		mux.ServeHTTP(w, r)
	}), nil
}

// all, as a key of the cache, is everything in it.
const all = "all"

func (n *Node) clearImageCache(_ context.Context, r *kmsapi.ClearImageCacheRequest) (*emptypb.Empty, error) {
	keys := map[string]string{"images": r.ImageHash, "measurements": r.ConfigHash}
	for _, key := range keys {
		if !cacheKey(key) {
			return nil, fault.New("cache_key", "invalid cache key")
		}
	}
	if n.cfg.Core.Admin.CacheDir == "" {
		return nil, nil
	}
	dir, err := os.OpenRoot(n.cfg.Core.Admin.CacheDir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(err, "cache_clear", "open core.admin.cache_dir")
	}
	defer dir.Close()
	for _, name := range []string{"images", "measurements"} {
		switch key := keys[name]; key {
		case "":
			continue
		case all:
			err = errors.Join(err, dir.RemoveAll(name))
		default:
			err = errors.Join(err, dir.RemoveAll(path.Join(name, key)))
		}
	}
	if err != nil {
		return nil, fault.Wrap(err, "cache_clear", "clear the cache")
	}
	n.log.Info("cache cleared", "images", keys["images"], "measurements", keys["measurements"])
	return nil, nil
}

// maxCacheKey is longer than any hash.
const maxCacheKey = 128

func cacheKey(key string) bool {
	return key == all || len(key) <= maxCacheKey && strings.Trim(key, "0123456789abcdefABCDEF") == ""
}
