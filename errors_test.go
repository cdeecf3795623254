// SPDX-License-Identifier: Apache-2.0

package dstack_test

import (
	"bytes"
	"flag"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

var updatePages = flag.Bool("update-pages", false, "rewrite the generated pages under docs/")

// fixedCode is what a code looks like.
var fixedCode = regexp.MustCompile(`^[a-z][a-z0-9_]*$`)

// codeUse is one place that makes an error with a code.
type codeUse struct {
	code, place, message, fix string
}

// collectCodes finds the literal codes in calls of fault.New and fault.Wrap, with
// the message beside them and the fix chained on.
func collectCodes(t *testing.T) []codeUse {
	t.Helper()
	var uses []codeUse
	goFiles(t, func(path string, src []byte) {
		if strings.HasSuffix(path, "_test.go") || strings.HasPrefix(path, "image/engine/") {
			return
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, src, parser.SkipObjectResolution)
		if err != nil {
			t.Fatal(err)
		}
		fixes := map[*ast.CallExpr]string{}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return true
			}
			sel, ok := call.Fun.(*ast.SelectorExpr)
			if !ok {
				return true
			}
			if sel.Sel.Name == "WithFix" && len(call.Args) > 0 {
				if inner, ok := sel.X.(*ast.CallExpr); ok {
					fixes[inner] = literal(call.Args[0])
				}
				return true
			}
			pkg, ok := sel.X.(*ast.Ident)
			if !ok || pkg.Name != "fault" {
				return true
			}
			at := map[string]int{"New": 0, "Wrap": 1}
			i, ok := at[sel.Sel.Name]
			if !ok || len(call.Args) < i+2 {
				return true
			}
			code, message := literal(call.Args[i]), literal(call.Args[i+1])
			if code == "" {
				return true
			}
			uses = append(uses, codeUse{code, filepath.ToSlash(filepath.Dir(path)), message, fixes[call]})
			return true
		})
	})
	return uses
}

func literal(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		if e.Kind == token.STRING {
			s, _ := strconv.Unquote(e.Value)
			return s
		}
	case *ast.BinaryExpr:
		if l, r := literal(e.X), literal(e.Y); l != "" && r != "" {
			return l + r
		}
	}
	return ""
}

// docs/errors.md lists every code that an error of this software can carry.
func TestErrorsPage(t *testing.T) {
	uses := collectCodes(t)
	if len(uses) < 50 {
		t.Fatalf("found %d uses only", len(uses))
	}
	slices.SortStableFunc(uses, func(a, b codeUse) int { return strings.Compare(a.code+a.place, b.code+b.place) })
	var page bytes.Buffer
	page.WriteString("# Error codes\n\nCodes are stable: programs and tests may compare them. `--json` prints `code`, `error` and\n`fix`. %s, %d and the like stand for what the error names. This page is generated from\nthe source (`go test -run TestErrorsPage . -args -update-pages`).\n\n| Code | From | What is wrong | Fix |\n|---|---|---|---|\n")
	seen := map[string]bool{}
	for _, u := range uses {
		if !fixedCode.MatchString(u.code) {
			t.Errorf("%s: %q is not a code", u.place, u.code)
		}
		row := fmt.Sprintf("| `%s` | %s | %s | %s |\n", u.code, u.place, cell(u.message), cell(u.fix))
		if !seen[row] {
			page.WriteString(row)
		}
		seen[row] = true
	}
	compare(t, "docs/errors.md", page.Bytes())
}

func cell(s string) string {
	s = strings.ReplaceAll(s, "|", "\\|")
	return strings.Join(strings.Fields(s), " ")
}

// compare holds a generated page against the committed one.
func compare(t *testing.T, path string, want []byte) {
	t.Helper()
	if *updatePages {
		if err := os.WriteFile(path, want, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	have, err := os.ReadFile(path)
	if err != nil || !bytes.Equal(have, want) {
		t.Errorf("%s is out of date: go test -run %s . -args -update-pages (%v)", path, t.Name(), err)
	}
}
