// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

// Package snippets tests that the configurations in docs/consumers.md for consumers that no
// test runs are valid.
package snippets

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsyntax"
	"github.com/hashicorp/nomad/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// blocks returns the code blocks in docs/consumers.md in the given language.
func blocks(t *testing.T, language string) (all []string) {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	doc, err := os.ReadFile(filepath.Join(root, "docs", "consumers.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, block := range strings.Split(string(doc), "```"+language+"\n")[1:] {
		block, _, _ = strings.Cut(block, "\n```")
		all = append(all, block+"\n")
	}
	if len(all) == 0 {
		t.Fatalf("docs/consumers.md has no %s block", language)
	}
	return all
}

func parse(t *testing.T, source string) *hclsyntax.Body {
	t.Helper()
	file, diagnostics := hclsyntax.ParseConfig([]byte(source), "consumers.md", hcl.InitialPos)
	if diagnostics.HasErrors() {
		t.Errorf("%v in\n%s", diagnostics, source)
		return nil
	}
	return file.Body.(*hclsyntax.Body)
}

// The policies and the configurations for Vault Agent, Terraform, and Nomad are valid HCL.
func TestHCLParses(t *testing.T) {
	for _, block := range blocks(t, "hcl") {
		parse(t, block)
	}
}

// Nomad's API has every block and attribute of the Nomad job.
func TestNomadJobHasKnownFields(t *testing.T) {
	jobs := 0
	for _, block := range blocks(t, "hcl") {
		if !strings.HasPrefix(block, "job ") {
			continue
		}
		jobs++
		if body := parse(t, block); body != nil {
			for _, unknown := range unknownFields("job", reflect.TypeFor[api.Job](), body.Blocks[0].Body) {
				t.Error(unknown)
			}
		}
	}
	if jobs != 1 {
		t.Errorf("docs/consumers.md has %d jobs, want one", jobs)
	}
	// The check finds unknown names.
	body := parse(t, `group "g" {
  task "t" {
    template {
      contents = ""
    }
    valut {}
  }
}`)
	if unknown := unknownFields("job", reflect.TypeFor[api.Job](), body); len(unknown) != 2 {
		t.Errorf("the check found %v, want two unknown names", unknown)
	}
}

// unknownFields returns the attributes and blocks of a body for which a type has no hcl tag.
func unknownFields(path string, of reflect.Type, body *hclsyntax.Body) (unknown []string) {
	for of.Kind() == reflect.Pointer || of.Kind() == reflect.Slice {
		of = of.Elem()
	}
	if of.Kind() != reflect.Struct {
		return nil // a map, which allows any name
	}
	attributes, children := map[string]bool{}, map[string]reflect.Type{}
	for n := range of.NumField() {
		name, kind, _ := strings.Cut(of.Field(n).Tag.Get("hcl"), ",")
		if kind == "block" {
			children[name] = of.Field(n).Type
		} else if name != "" {
			attributes[name] = true
		}
	}
	for name := range body.Attributes {
		if !attributes[name] {
			unknown = append(unknown, fmt.Sprintf("%s has no attribute %s", path, name))
		}
	}
	for _, block := range body.Blocks {
		child, ok := children[block.Type]
		if !ok {
			unknown = append(unknown, fmt.Sprintf("%s has no block %s", path, block.Type))
			continue
		}
		unknown = append(unknown, unknownFields(path+"."+block.Type, child, block.Body)...)
	}
	return unknown
}

// systemd-analyze accepts the documented unit.
func TestSystemdVerifiesTheUnit(t *testing.T) {
	if _, err := exec.LookPath("systemd-analyze"); err != nil {
		harness.Missing(t, "systemd-analyze is not on PATH: install systemd")
	}
	dir := t.TempDir()
	units := blocks(t, "ini")
	if len(units) != 1 {
		t.Fatalf("docs/consumers.md has %d units, want one", len(units))
	}
	verify := func(unit string) (string, error) {
		for name, content := range map[string]string{
			"reports.service": unit,
			// The service in the unit's Wants.
			"vault-agent.service": "[Service]\nExecStart=/bin/true\n",
		} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		out, err := exec.CommandContext(t.Context(), "systemd-analyze", "verify", filepath.Join(dir, "reports.service")).CombinedOutput()
		return string(out), err
	}
	unit := strings.ReplaceAll(units[0], "/usr/bin/reports", "/bin/true") // a program that exists
	if out, err := verify(unit); err != nil || strings.Contains(out, "reports.service") {
		t.Errorf("%v\n%s", err, out)
	}
	if out, err := verify(unit + "LoadCredentials=x:/y\n"); err == nil && !strings.Contains(out, "LoadCredentials") {
		t.Errorf("systemd-analyze accepted a misspelled name: %s", out)
	}
}
