// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"go/ast"
	"go/parser"
	gotoken "go/token"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// This file compares the messages in docs/troubleshooting.md with those in the code, in both
// directions.
//
// Each row of the document's tables begins with a message in backquotes. A message is a
// string in the code, with … for each inserted value. A part of a longer message counts as a
// separate message. The section about Vault lists messages that tests expect.

const troubleshootingDoc = "docs/troubleshooting.md"

// unseenTexts lists strings in the code that look like messages, and why they are not.
var unseenTexts = map[string]string{
	"the config is backed off":          "internal; ends waits",
	"the role or its config changed":    "internal; the request starts over or returns another error",
	"MojoAuth is throttling":            "no mint fails with this error",
	"cannot write to readonly storage":  "matches errors of other software",
	"please forward to the active node": "matches errors of other software",
	"node is not the leader":            "matches errors of other software",
	"vault is in standby mode":          "matches errors of other software",
	"remote error":                      "matches errors of other software",
	"local error":                       "matches errors of other software",
	"Each config holds one MojoAuth application. Read a config at config/<name>.": "help",
	"Read a role at roles/<name>, and its access token at creds/<name>.":          "help",
	"List the names of all ….":                               "help",
	"for example https://your-app.mojoauth.com/oauth2/token": "part of other messages",
	"… KiB (… bytes)":                                        "part of other messages",
	"… bytes":                                                "part of other messages",
}

// verb matches a formatting verb.
var verb = regexp.MustCompile(`%[.0-9]*[a-z]`)

// textOf returns the text of an expression: a string, or several strings joined with +.
func textOf(e ast.Expr) (text string, ok bool) {
	switch e := e.(type) {
	case *ast.ParenExpr:
		return textOf(e.X)
	case *ast.BasicLit:
		if e.Kind != gotoken.STRING {
			return "", false
		}
		text, err := strconv.Unquote(e.Value)
		text = strings.ReplaceAll(text, "%q", `"…"`)
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

// prose matches a text of at least two words.
var prose = regexp.MustCompile(`[\p{L}…][^ ]* +[^ ]*\p{L}`)

// joint matches the separator between a text and the one before it.
var joint = regexp.MustCompile(`^…?[.;] `)

// textsInCode returns the messages in the code that users and operators see, with their
// positions. It skips descriptions and help, which only path-help shows.
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
					// Ignore a leading separator.
					texts[joint.ReplaceAllString(text, "")] = fset.Position(n.Pos()).String()
				}
				return false
			}
			return true
		})
	}
	return texts
}

// docText is a row in one of the document's tables.
type docText struct {
	section, text string
	line          int
}

// vaultSection is the section with messages from Vault and OpenBao.
const vaultSection = "Texts of Vault and OpenBao"

// docTexts returns the messages in the document's tables, in order.
func docTexts(t *testing.T) (texts []docText) {
	t.Helper()
	content, err := os.ReadFile(troubleshootingDoc)
	if err != nil {
		t.Fatal(err)
	}
	row, heading := regexp.MustCompile("^\\| `(.+?)` \\| "), regexp.MustCompile("^##+ (.+)$")
	section := ""
	for i, line := range strings.Split(string(content), "\n") {
		if m := heading.FindStringSubmatch(line); m != nil {
			section = m[1]
		}
		if m := row.FindStringSubmatch(line); m != nil && section != "How to read an error" {
			texts = append(texts, docText{section, m[1], i + 1})
		}
	}
	return texts
}

// The document and the code contain the same messages.
func TestTroubleshootingTexts(t *testing.T) {
	code := textsInCode(t)
	for text := range unseenTexts {
		if code[text] == "" {
			t.Errorf("unseenTexts has %q, which is not in the code: remove it", text)
		}
		delete(code, text)
	}
	listed := make(map[string]bool)
	for _, row := range docTexts(t) {
		if row.section == vaultSection {
			continue
		}
		if code[row.text] == "" {
			t.Errorf("%s, line %d: the code does not contain this message: correct or remove it\n%s", troubleshootingDoc, row.line, row.text)
		}
		if listed[row.text] {
			t.Errorf("%s, line %d: the message is listed twice: remove one\n%s", troubleshootingDoc, row.line, row.text)
		}
		listed[row.text] = true
	}
	for text, at := range code {
		if !listed[text] {
			t.Errorf("%s does not list this message from %s: add it with its cause and fix\n%s", troubleshootingDoc, at, text)
		}
	}
}

// The messages are in alphabetical order, because readers look them up by their first words.
func TestTroubleshootingIsInOrder(t *testing.T) {
	beginning := func(row docText) string {
		return strings.ToLower(strings.TrimLeft(row.text, "…\". ;:,"))
	}
	rows := docTexts(t)
	for i := 1; i < len(rows); i++ {
		if before, row := rows[i-1], rows[i]; before.section == row.section && beginning(before) > beginning(row) {
			t.Errorf("%s, line %d: the message belongs before the one above it\n%s", troubleshootingDoc, row.line, row.text)
		}
	}
}

// A test expects each message in the section about Vault.
func TestTroubleshootingTextsOfVault(t *testing.T) {
	files, err := filepath.Glob("e2e/*_test.go")
	if err != nil {
		t.Fatal(err)
	}
	var tests strings.Builder
	for _, name := range append(files, "docs_test.go") {
		content, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		tests.Write(content)
	}
	n := 0
	for _, row := range docTexts(t) {
		if row.section != vaultSection {
			continue
		}
		n++
		if !strings.Contains(tests.String(), row.text) {
			t.Errorf("%s, line %d: no test expects this message: remove it, or test it\n%s", troubleshootingDoc, row.line, row.text)
		}
	}
	if n == 0 {
		t.Errorf("%s has no messages in the section %q", troubleshootingDoc, vaultSection)
	}
}

// unexplained returns the parts of a text that are neither messages in the document nor
// single values.
func unexplained(rows []docText, text string) (parts []string) {
	texts := slices.Collect(maps.Keys(unseenTexts))
	for _, row := range rows {
		texts = append(texts, row.text)
	}
	var fragments []string
	for _, documented := range texts {
		for fragment := range strings.SplitSeq(documented, "…") {
			if fragment = strings.Trim(fragment, " .:;,()\""); prose.MatchString(fragment) {
				fragments = append(fragments, fragment)
			}
		}
	}
	slices.SortFunc(fragments, func(a, b string) int { return len(b) - len(a) })
	for _, fragment := range fragments {
		text = strings.ReplaceAll(text, fragment, "\n")
	}
	words := regexp.MustCompile(`\pL{2,} \pL{2,}`)
	for part := range strings.SplitSeq(text, "\n") {
		if words.MatchString(part) {
			parts = append(parts, part)
		}
	}
	return parts
}
