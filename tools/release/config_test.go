// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package release checks the configuration of goreleaser, in a fraction of the time that
// building goreleaser takes.
package release

import (
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/goreleaser/goreleaser/v2/pkg/config"
)

const (
	configFile = "../../.goreleaser.yaml"
	makefile   = "../../Makefile"
)

func load(t *testing.T) config.Project {
	t.Helper()
	file, err := os.Open(configFile)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// Fields that goreleaser does not know are an error.
	project, err := config.LoadReader(file)
	if err != nil {
		t.Fatal(err)
	}
	if project.Version != 2 || len(project.Builds) != 1 || len(project.Archives) != 1 {
		t.Fatalf("got version %d, %d builds and %d archives, want version 2 and one of each",
			project.Version, len(project.Builds), len(project.Archives))
	}
	return project
}

// At a tag, `make build` builds the same binary as the release.
func TestBuildsAsTheMakefile(t *testing.T) {
	content, err := os.ReadFile(makefile)
	if err != nil {
		t.Fatal(err)
	}
	text := string(content)
	want := func(pattern string) string {
		t.Helper()
		match := regexp.MustCompile(pattern).FindStringSubmatch(text)
		if match == nil {
			t.Fatalf("the Makefile has no line like %s", pattern)
		}
		return match[1]
	}
	ldflags := want(`(?m)^LDFLAGS +:= (.*)$`)
	commandline := want(`(?m)^\t(.* go build .*-o \$\(OUT\).*)$`)
	for name, value := range map[string]string{
		"$(MODULE)":  want(`(?m)^MODULE +:= (.*)$`),
		"$(VERSION)": "{{ .Version }}",
		"$(COMMIT)":  "{{ slice .FullCommit 0 12 }}",
	} {
		ldflags = strings.ReplaceAll(ldflags, name, value)
	}

	build := load(t).Builds[0]
	if got := strings.Join(build.Ldflags, " "); got != ldflags {
		t.Errorf("goreleaser links with\n\t%s\nand the Makefile with\n\t%s", got, ldflags)
	}
	if got, want := strings.Join(build.Env, " ")+" go build "+strings.Join(build.Flags, " ")+
		` -ldflags "$(LDFLAGS)" -o $(OUT) ./cmd/$(NAME)`, commandline; got != want {
		t.Errorf("goreleaser builds with\n\t%s\nand the Makefile with\n\t%s", got, want)
	}
}

// The README, HashiCorp's tools and tools/release/sbom expect these names of the
// archives.
func TestNames(t *testing.T) {
	project := load(t)
	for got, want := range map[string]string{
		project.ProjectName:                      "vault-plugin-secrets-mojoauth",
		project.Archives[0].NameTemplate:         "{{ .ProjectName }}_{{ .Version }}_{{ .Os }}_{{ .Arch }}",
		project.Checksum.NameTemplate:            "{{ .ProjectName }}_{{ .Version }}_SHA256SUMS",
		project.Archives[0].Formats[0]:           "zip",
		project.Archives[0].Files[0].Destination: "LICENSE.txt",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
	// goreleaser must have neither the key nor the permission to publish.
	if len(project.Signs) != 0 || project.Release.Disable != "true" {
		t.Errorf("goreleaser signs %d times and has release.disable %q, want signing and publishing left to scripts/release.sh", len(project.Signs), project.Release.Disable)
	}
	build := project.Builds[0]
	for _, platform := range []string{"linux", "darwin", "windows", "freebsd"} {
		if !slices.Contains(build.Goos, platform) {
			t.Errorf("no build for %s", platform)
		}
	}
	if !slices.Equal(build.Goarch, []string{"amd64", "arm64"}) {
		t.Errorf("got builds for %v, want amd64 and arm64", build.Goarch)
	}
}
