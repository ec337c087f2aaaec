// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"unicode"
)

var (
	docFences   = regexp.MustCompile("(?ms)^ *```.*?^ *```$")
	docHeadings = regexp.MustCompile(`(?m)^#+ +(.*?)\s*$`)
	docLinks    = regexp.MustCompile(`\]\(([^()\s]+)\)`)
	docLinkText = regexp.MustCompile(`\[([^\]]*)\]\([^)]*\)`)
)

// docAnchors returns the anchors that GitHub generates for the headings of a text.
func docAnchors(text string) map[string]bool {
	anchors := make(map[string]bool)
	for _, match := range docHeadings.FindAllStringSubmatch(docFences.ReplaceAllString(text, ""), -1) {
		var anchor strings.Builder
		for _, r := range strings.ToLower(docLinkText.ReplaceAllString(match[1], "$1")) {
			switch {
			case unicode.IsLetter(r), unicode.IsDigit(r), r == '_', r == '-':
				anchor.WriteRune(r)
			case r == ' ':
				anchor.WriteRune('-')
			}
		}
		unique := anchor.String()
		for n := 1; anchors[unique]; n++ {
			unique = fmt.Sprintf("%s-%d", anchor.String(), n)
		}
		anchors[unique] = true
	}
	return anchors
}

func TestDocAnchors(t *testing.T) {
	got := docAnchors("# Create/update config\n```sh\n# a comment\n```\n## Why is `ttl` a_b?\n## Same\n## Same\n## A [link](x.md)\n")
	for _, want := range []string{"createupdate-config", "why-is-ttl-a_b", "same", "same-1", "a-link"} {
		if !got[want] {
			t.Errorf("no anchor %q in %v", want, got)
		}
	}
	if len(got) != 5 {
		t.Errorf("got %v, want five anchors", got)
	}
}

// Every link in the documents to a file in the repository, or to a heading in one, is valid.
func TestDocsLinks(t *testing.T) {
	texts := make(map[string]string)
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*.md", "deploy/*/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range files {
			content, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			texts[file] = string(content)
		}
	}
	links := 0
	for file, text := range texts {
		for _, match := range docLinks.FindAllStringSubmatch(docFences.ReplaceAllString(text, ""), -1) {
			if strings.Contains(match[1], "://") || strings.HasPrefix(match[1], "mailto:") {
				continue
			}
			links++
			path, anchor, hasAnchor := strings.Cut(match[1], "#")
			target := file
			if path != "" {
				target = filepath.Join(filepath.Dir(file), path)
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s links to %s, which does not exist", file, match[1])
				continue
			}
			if hasAnchor && !docAnchors(texts[target])[anchor] {
				t.Errorf("%s links to %s, but %s has no such heading", file, match[1], target)
			}
		}
	}
	if links < 100 {
		t.Errorf("found only %d links, want at least 100: the pattern is out of date", links)
	}
}
