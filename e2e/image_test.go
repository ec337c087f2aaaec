// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"archive/zip"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// zipped is an entry of an archive.
type zipped struct {
	name    string
	content string // of a link, what it leads to
	mode    fs.FileMode
}

func writeZip(t *testing.T, file string, entries ...zipped) {
	t.Helper()
	out, err := os.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	writer := zip.NewWriter(out)
	for _, e := range entries {
		header := &zip.FileHeader{Name: e.name}
		header.SetMode(e.mode)
		w, err := writer.CreateHeader(header)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(e.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
}

// scripts/image.sh takes a release's archive from anybody, and writes nothing outside
// of its own directory whatever the archive holds.
func TestImageScriptTakesOnlyFiles(t *testing.T) {
	t.Parallel()
	for _, tool := range []string{"unzip", "sha256sum"} {
		if _, err := exec.LookPath(tool); err != nil {
			harness.Missing(t, "%s is not on PATH: scripts/image.sh is not tested", tool)
		}
	}
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	const precious = "precious"
	plugin := zipped{pluginName, "binary", 0o755}
	licence := zipped{"LICENSE.txt", "licence", 0o644}
	for name, c := range map[string]struct {
		entries func(victim string) []zipped
		text    string
	}{
		// The engine is no program that makes images: that is what stops it, at the end.
		"as it should be": {func(string) []zipped { return []zipped{licence, plugin} }, "ENGINE is true"},
		"a link for the authorities": {func(victim string) []zipped {
			return []zipped{licence, plugin, {"ca-certificates.crt", victim, fs.ModeSymlink | 0o777}}
		}, "alone"},
		"a link for the licence": {func(victim string) []zipped {
			return []zipped{plugin, {"LICENSE.txt", victim, fs.ModeSymlink | 0o777}}
		}, "something else than files"},
		"a link for the binary": {func(victim string) []zipped {
			return []zipped{licence, {pluginName, victim, fs.ModeSymlink | 0o777}}
		}, "something else than files"},
		"a link, then a file through it": {func(victim string) []zipped {
			return []zipped{licence, {pluginName, victim, fs.ModeSymlink | 0o777}, plugin}
		}, "alone"},
		"a path upwards": {func(string) []zipped {
			return []zipped{licence, plugin, {"../victim", "x", 0o644}}
		}, "alone"},
		"a directory": {func(string) []zipped {
			return []zipped{licence, plugin, {"directory/", "", fs.ModeDir | 0o755}}
		}, "alone"},
		"no licence": {func(string) []zipped { return []zipped{plugin} }, "alone"},
	} {
		dir := t.TempDir()
		victim := filepath.Join(dir, "victim")
		bundle := filepath.Join(dir, "bundle.pem")
		for file, content := range map[string]string{victim: precious, bundle: "-----BEGIN CERTIFICATE-----\n"} {
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		archive := filepath.Join(dir, pluginName+"_1.2.3_linux_amd64.zip")
		writeZip(t, archive, c.entries(victim)...)
		cmd := exec.Command(filepath.Join(root, "scripts", "image.sh"), archive)
		cmd.Env = append(os.Environ(), "ENGINE=true", "CA_BUNDLE="+bundle, "TMPDIR="+dir)
		out, err := cmd.CombinedOutput()
		if err == nil || !strings.Contains(string(out), c.text) {
			t.Errorf("%s: got %v, want it to stop with %q\n%s", name, err, c.text, out)
		}
		info, err := os.Stat(victim)
		if err != nil {
			t.Fatal(err)
		}
		content, err := os.ReadFile(victim)
		if err != nil {
			t.Fatal(err)
		}
		if string(content) != precious || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: a file elsewhere became %q with mode %s", name, content, info.Mode())
		}
	}
}
