// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// shellBlocks returns the blocks of shell commands in a document, without indentation.
func shellBlocks(t *testing.T, name string) []string {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	var blocks []string
	for _, m := range regexp.MustCompile("(?ms)^( *)```sh\n(.*?)^ *```$").FindAllStringSubmatch(string(doc), -1) {
		blocks = append(blocks, strings.ReplaceAll("\n"+m[2], "\n"+m[1], "\n"))
	}
	if len(blocks) == 0 {
		t.Fatalf("%s has no commands", name)
	}
	return blocks
}

// The commands in docs/operations.md and docs/monitoring.md work as written. Other tests run
// the blocks that this test skips.
func TestDocumentedCommands(t *testing.T) {
	t.Parallel()
	if _, err := exec.LookPath("bash"); err != nil {
		harness.Missing(t, "bash is not on PATH: the documented commands are not tested")
	}
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/reports", role(nil))
	w.write("roles/second", role(nil))
	bin := t.TempDir()
	if err := os.Symlink(w.vault.Binary, filepath.Join(bin, "vault")); err != nil {
		t.Fatal(err)
	}
	elsewhere := map[string]string{ // the tests that run a block, by its text
		"scripts/register.sh": "TestRegisterScript",
		"sys/plugins/pins":    "TestVersionsAsVaultTellsThem",
		"/faults":             "TestDocumentedFaults",
	}
	for document, want := range map[string]int{"docs/operations.md": 7, "docs/monitoring.md": 1} {
		ran := 0
	blocks:
		for _, block := range shellBlocks(t, document) {
			for text := range elsewhere {
				if strings.Contains(block, text) {
					continue blocks
				}
			}
			ran++
			cmd := exec.CommandContext(t.Context(), "bash", "-euo", "pipefail", "-c", block)
			cmd.Env = append(append(os.Environ(), w.vault.Environment()...), "PATH="+bin+":"+os.Getenv("PATH"))
			cmd.Stdin = strings.NewReader(canary + "\n")
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s\n%s", document, err, block, out)
			}
		}
		if ran != want {
			t.Errorf("ran %d blocks of %s, want %d: list blocks that other tests run in elsewhere", ran, document, want)
		}
	}
	if got := w.read("config").Data["max_requests_per_second"]; got != json.Number("15") {
		t.Errorf("max_requests_per_second is %v, want 15 as set in docs/operations.md", got)
	}
	// The commands rotate reports twice, and each of the two roles once after a restore.
	if got := w.read("status").Data["mints"]; got != json.Number("4") {
		t.Errorf("got %v mints, want 4", got)
	}
	w.noCanary()
}

// docs/monitoring.md lists the OAuth server's faults, and its commands set existing faults.
func TestDocumentedFaults(t *testing.T) {
	t.Parallel()
	var want []string
	for _, field := range reflect.VisibleFields(reflect.TypeFor[oauthserver.Faults]()) {
		key, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		want = append(want, key)
	}
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "monitoring.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, table, found := strings.Cut(string(doc), "| Field | Effect |")
	if !found {
		t.Fatal("docs/monitoring.md has no table of faults")
	}
	var got []string
	for _, row := range regexp.MustCompile("(?m)^\\| (`.*?`) \\|").FindAllStringSubmatch(table, -1) {
		for _, key := range strings.Split(row[1], ", ") {
			got = append(got, strings.Trim(key, "`"))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("docs/monitoring.md lists the faults %q, want %q", got, want)
	}

	bodies := regexp.MustCompile(`curl -X PUT \$OAUTH/faults -d '(.*)'`).FindAllStringSubmatch(string(doc), -1)
	if len(bodies) < 3 {
		t.Fatalf("got the faults %q in docs/monitoring.md, want at least three", bodies)
	}
	for _, body := range bodies {
		decoder := json.NewDecoder(strings.NewReader(body[1]))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(new(oauthserver.Faults)); err != nil {
			t.Errorf("%s: %v", body[1], err)
		}
	}
}
