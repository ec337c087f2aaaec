// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// This file compares docs/troubleshooting.md with the texts in the code, in both directions.
//
// The rows of the document's tables begin with texts in backquotes. A text is a string in
// the code, with … for each value that the code puts in. A part of a longer text counts as a
// text of its own. In the section about Vault, the texts are those that tests expect.

const troubleshootingDoc = "docs/troubleshooting.md"

// unseenTexts are strings in the code that look like texts and reach nobody.
var unseenTexts = map[string]string{
	"the config is backed off": "ends waits within the engine",
}

// verb is a value in a format.
var verb = regexp.MustCompile(`%[.0-9]*[a-z]`)

// textOf returns the text that an expression makes: a string, or several that + joins.
func textOf(e ast.Expr) (text string, ok bool) {
	switch e := e.(type) {
	case *ast.ParenExpr:
		return textOf(e.X)
	case *ast.BasicLit:
		if e.Kind != gotoken.STRING {
			return "", false
		}
		text, err := strconv.Unquote(e.Value)
		return verb.ReplaceAllString(text, "…"), err == nil
	case *ast.BinaryExpr:
		if e.Op != gotoken.ADD {
			return "", false
		}
		x, xOK := textOf(e.X)
		y, yOK := textOf(e.Y)
		if !xOK && !yOK {
			return "", false
		}
		if !xOK {
			x = "…"
		}
		if !yOK {
			y = "…"
		}
		return x + y, true
	}
	return "", false
}

// prose is what at least two words have between them.
var prose = regexp.MustCompile(`[\p{L}…][^ ]* +[^ ]*\p{L}`)

// textsInCode returns the texts in the code that users and operators see, with the places
// where they are. Descriptions and help are no such texts: path-help shows them.
func textsInCode(t *testing.T) map[string]string {
	t.Helper()
	files, err := filepath.Glob("*.go")
	if err != nil {
		t.Fatal(err)
	}
	files = append(files, "cmd/vault-plugin-secrets-mojoauth/main.go")
	texts := make(map[string]string)
	for _, name := range files {
		if strings.HasSuffix(name, "_test.go") {
			continue
		}
		fset := gotoken.NewFileSet()
		file, err := parser.ParseFile(fset, name, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		ast.Inspect(file, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ImportSpec:
				return false
			case *ast.Field: // with a tag
				return n.Tag == nil
			case *ast.ValueSpec:
				return !strings.HasSuffix(n.Names[0].Name, "Help")
			case *ast.KeyValueExpr:
				key, _ := n.Key.(*ast.Ident)
				return key == nil || !slices.Contains([]string{"Description", "HelpSynopsis", "HelpDescription", "Summary", "Help", "DisplayAttrs"}, key.Name)
			case *ast.CallExpr:
				called, ok := n.Fun.(*ast.SelectorExpr)
				return !ok || called.Sel.Name != "NewDesc"
			case ast.Expr:
				text, ok := textOf(n)
				if !ok {
					return true
				}
				if prose.MatchString(text) {
					texts[strings.TrimSpace(text)] = fset.Position(n.Pos()).String()
				}
				return false
			}
			return true
		})
	}
	return texts
}

func TestListTexts(t *testing.T) {
	for text, at := range textsInCode(t) {
		os.Stdout.WriteString(at + "\t" + text + "\n")
	}
}
