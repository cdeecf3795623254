// SPDX-License-Identifier: Apache-2.0

package node

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const adminTokenText = "0123456789abcdef0123456789abcdef"

// filledCache makes a cache of two images and two measurements, and something beside it.
func filledCache(t *testing.T) (dir string, url string) {
	t.Helper()
	top := t.TempDir()
	dir = filepath.Join(top, "cache")
	for _, f := range []string{"cache/images/aa/image", "cache/images/bb/image", "cache/measurements/cc/m", "cache/measurements/dd/m", "cache/kept", "secret/aa/key", "aa/key"} {
		path := filepath.Join(top, f)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n := &Node{log: slog.New(slog.DiscardHandler), Version: "v0 (test)"}
	n.cfg.Core.Admin.CacheDir = dir
	if err := n.cfg.Core.Admin.AuthToken.UnmarshalText([]byte(adminTokenText)); err != nil {
		t.Fatal(err)
	}
	h, err := n.admin()
	if err != nil {
		t.Fatal(err)
	}
	s := httptest.NewServer(h)
	t.Cleanup(s.Close)
	return dir, s.URL
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func clearCache(t *testing.T, url, image, config string) (int, string) {
	t.Helper()
	body, err := json.Marshal(map[string]string{"image_hash": image, "config_hash": config})
	if err != nil {
		t.Fatal(err)
	}
	status, text, _ := httpDo(t, "POST", url+"/prpc/Admin.ClearImageCache?json", map[string]string{"Authorization": "Bearer " + adminTokenText}, string(body))
	return status, text
}

func TestClearingTheCache(t *testing.T) {
	dir, url := filledCache(t)
	if status, text := clearCache(t, url, "", ""); status != 200 || text != "null" || !exists(dir+"/images/aa") || !exists(dir+"/measurements/cc") {
		t.Errorf("nothing: %d %q", status, text)
	}
	if status, text := clearCache(t, url, "aa", ""); status != 200 || exists(dir+"/images/aa") || !exists(dir+"/images/bb") || !exists(dir+"/measurements/cc") {
		t.Errorf("an image: %d %q", status, text)
	}
	if status, text := clearCache(t, url, "aa", "cc"); status != 200 || exists(dir+"/measurements/cc") || !exists(dir+"/measurements/dd") {
		t.Errorf("a measurement, and an image that is gone: %d %q", status, text)
	}
	if status, text := clearCache(t, url, "all", "all"); status != 200 || exists(dir+"/images") || exists(dir+"/measurements") || !exists(dir+"/kept") {
		t.Errorf("all: %d %q", status, text)
	}
}

// What a request names is below the cache's directory, or it is refused.
func TestThreat_G11_NamesDoNotLeaveTheCache(t *testing.T) {
	dir, url := filledCache(t)
	top := filepath.Dir(dir)
	for _, key := range []string{
		"..", "../aa", "../../aa", "../secret/aa", "/etc", top + "/secret", "aa/../../kept", "aa\x00", "\x00", "aa/", "./aa", "aa bb", "*", "%2e%2e", "ALL",
		"aa\n", "xyz", strings.Repeat("a", 129),
	} {
		for _, pair := range [][2]string{{key, ""}, {"", key}, {"aa", key}} {
			status, text := clearCache(t, url, pair[0], pair[1])
			if status != 400 || !strings.Contains(text, "invalid cache key") {
				t.Errorf("%q: %d %q", pair, status, text)
			}
		}
	}
	// Links inside of the directory lead nowhere.
	if err := os.Symlink(filepath.Join(top, "secret", "aa"), filepath.Join(dir, "images", "ee")); err != nil {
		t.Fatal(err)
	}
	if status, text := clearCache(t, url, "ee", ""); status != 200 || exists(filepath.Join(dir, "images", "ee")) {
		t.Errorf("a link as an image: %d %q", status, text)
	}
	if err := os.RemoveAll(filepath.Join(dir, "measurements")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(top, "secret"), filepath.Join(dir, "measurements")); err != nil {
		t.Fatal(err)
	}
	if status, text := clearCache(t, url, "", "aa"); status != 400 || !strings.Contains(text, "cache_clear") {
		t.Errorf("a link as the directory: %d %q", status, text)
	}
	for _, path := range []string{"secret/aa/key", "aa/key", "cache/kept", "cache/images/aa/image", "cache/images/bb/image"} {
		if !exists(filepath.Join(top, path)) {
			t.Errorf("%s is gone", path)
		}
	}
}

func TestThreat_G11_AdministratorsShowTheirToken(t *testing.T) {
	_, url := filledCache(t)
	basic := func(text string) string { return "Basic " + base64.StdEncoding.EncodeToString([]byte(text)) }
	for _, c := range []struct {
		header, value string
		status        int
	}{
		{"X-Admin-Token", adminTokenText, 200},
		{"Authorization", "Bearer " + adminTokenText, 200},
		{"Authorization", basic("anyone:" + adminTokenText), 200},
		{"Authorization", basic(adminTokenText + ":"), 200},
		{"", "", 401},
		{"X-Admin-Token", "", 401},
		{"X-Admin-Token", adminTokenText[:31], 401},
		{"X-Admin-Token", adminTokenText + "0", 401},
		{"Authorization", "Bearer ", 401},
		{"Authorization", "bearer " + adminTokenText, 401},
		{"Authorization", adminTokenText, 401},
		{"Authorization", basic(adminTokenText + ":x"), 401},
		{"Authorization", basic(":"), 401},
	} {
		header := map[string]string{}
		if c.header != "" {
			header[c.header] = c.value
		}
		status, text, h := httpDo(t, "POST", url+"/prpc/ClearImageCache?json", header, "{}")
		if status != c.status || status == 401 && h.Get("WWW-Authenticate") != `Basic realm="dstack-kms admin"` || strings.Contains(text, adminTokenText[:8]) {
			t.Errorf("%s %q: %d %q", c.header, c.value, status, text)
		}
	}
	// A token in the query would be in logs.
	if status, _, _ := httpDo(t, "POST", fmt.Sprintf("%s/prpc/ClearImageCache?json&token=%s", url, adminTokenText), nil, "{}"); status != 401 {
		t.Errorf("a token in the query: %d", status)
	}
	if status, text, h := httpDo(t, "GET", url+"/health", nil, ""); status != 200 || text != "OK" || h.Get("X-App-Version") == "" {
		t.Errorf("health: %d %q", status, text)
	}
}
