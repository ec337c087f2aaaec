// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package main

import (
	"archive/zip"
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	cdx "github.com/CycloneDX/cyclonedx-go"
)

// The test's own binary stands in for the plugin: it is a Go binary with modules.
func TestSBOM(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(self) //nolint:gosec // its own binary
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	archive := filepath.Join(dir, binary+"_1.2.3_windows_arm64.zip")
	var packed bytes.Buffer
	w := zip.NewWriter(&packed)
	for name, data := range map[string][]byte{"LICENSE.txt": []byte("..."), binary + ".exe": content} {
		f, err := w.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(archive, packed.Bytes(), 0o600); err != nil {
		t.Fatal(err)
	}

	var written [2][]byte
	for i := range written {
		file := filepath.Join(dir, fmt.Sprint(i))
		if err := run(archive, file); err != nil {
			t.Fatal(err)
		}
		if written[i], err = os.ReadFile(file); err != nil { //nolint:gosec // a file in the test's directory
			t.Fatal(err)
		}
	}
	if !bytes.Equal(written[0], written[1]) {
		t.Error("two runs wrote different bytes")
	}

	var bom cdx.BOM
	if err := cdx.NewBOMDecoder(bytes.NewReader(written[0]), cdx.BOMFileFormatJSON).Decode(&bom); err != nil {
		t.Fatal(err)
	}
	plugin := bom.Metadata.Component
	if plugin.Name != binary || plugin.Version != "1.2.3" {
		t.Errorf("got component %s %s, want %s 1.2.3", plugin.Name, plugin.Version, binary)
	}
	if got, want := (*plugin.Hashes)[0].Value, fmt.Sprintf("%x", sha256.Sum256(content)); got != want {
		t.Errorf("got checksum %s, want %s", got, want)
	}
	if bom.SerialNumber != "" || bom.Metadata.Timestamp != "" {
		t.Errorf("got serial number %q and time %q, want none", bom.SerialNumber, bom.Metadata.Timestamp)
	}
	found := map[string]bool{}
	for _, c := range *bom.Components {
		found[strings.Split(c.PackageURL, "@")[0]] = true
		if c.Name == "stdlib" && c.Version != strings.TrimPrefix(strings.Fields(runtime.Version())[0], "go") {
			t.Errorf("got Go %s, want %s", c.Version, runtime.Version())
		}
	}
	for _, want := range []string{"pkg:golang/stdlib", "pkg:golang/github.com/CycloneDX/cyclonedx-go"} {
		if !found[want] {
			t.Errorf("no %s in %v", want, found)
		}
	}
}

func TestOtherNamesAreRefused(t *testing.T) {
	for _, name := range []string{"other_1.2.3_linux_amd64.zip", binary + "_1.2.3.zip", "dir/" + binary + ".zip"} {
		if version, err := versionOf(name); err == nil {
			t.Errorf("%s: got version %q, want an error", name, version)
		}
	}
}
