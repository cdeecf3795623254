// SPDX-License-Identifier: Apache-2.0

package node

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
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
	addr := net.JoinHostPort(a.Address, strconv.Itoa(int(a.Port)))
	l, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fault.Wrap(err, "kms_listen", "listen for administrators on %s", addr)
	}
	s := prpc.Server(n.admin())
	s.ErrorLog = slog.NewLogLogger(n.log.Handler(), slog.LevelDebug)
	go s.Serve(l)
	n.log.Info("administrators", "address", l.Addr().String())
	return func() { s.Close() }, nil
}

// admin is the handler; all of it but /health asks for the token.
func (n *Node) admin() http.Handler {
	mux := http.NewServeMux()
	mux.Handle("/prpc/", prpc.NewMux([]string{"Admin."}, prpc.Unary("ClearImageCache", n.clearImageCache)))
	want := sha256.Sum256([]byte(n.cfg.Core.Admin.AuthToken.Reveal()))
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("X-App-Version", n.Version)
		if r.URL.Path == "/health" {
			io.WriteString(w, "OK")
			return
		}
		// The digests have one length, so that the comparison tells none.
		given := sha256.Sum256([]byte(adminToken(r)))
		if subtle.ConstantTimeCompare(given[:], want[:]) != 1 {
			w.Header().Set("WWW-Authenticate", `Basic realm="dstack-kms admin"`)
			http.Error(w, "the administrators' token is missing or wrong", http.StatusUnauthorized)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// adminToken returns the token of a request: X-Admin-Token, bearer, or Basic, where it
// is the password, or the user name without a password.
func adminToken(r *http.Request) string {
	if t := r.Header.Get("X-Admin-Token"); t != "" {
		return t
	}
	if t, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer "); ok {
		return t
	}
	user, password, _ := r.BasicAuth()
	if password == "" {
		return user
	}
	return password
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
