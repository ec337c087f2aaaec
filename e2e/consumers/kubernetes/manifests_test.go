// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package kubernetes

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// documentation is a section of docs/consumers.md.
type documentation struct {
	testing.TB
	title string
	yaml  []string   // its YAML blocks
	shell [][]string // the commands in its shell blocks, split into words
}

// documented reads a section of docs/consumers.md.
func documented(t testing.TB, title string) documentation {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(filepath.Join(root, "docs", "consumers.md"))
	if err != nil {
		t.Fatal(err)
	}
	_, section, ok := strings.Cut(string(content), "\n## "+title+"\n")
	if !ok {
		t.Fatalf("docs/consumers.md has no section %q", title)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	d := documentation{TB: t, title: title}
	for i, part := range strings.Split(section, "\n```") {
		if i%2 == 0 {
			continue // between two blocks
		}
		language, block, _ := strings.Cut(part, "\n")
		switch language {
		case "yaml":
			d.yaml = append(d.yaml, block+"\n")
		case "sh":
			for command := range strings.Lines(strings.ReplaceAll(block, "\\\n", " ")) {
				d.shell = append(d.shell, strings.Fields(command))
			}
		}
	}
	return d
}

// manifests returns the section's manifests in order. Partial manifests have no kind.
func (d documentation) manifests() (all []manifest) {
	d.Helper()
	for _, block := range d.yaml {
		in, err := manifestsIn(block)
		if err != nil {
			d.Fatalf("%s: %v in\n%s", d.title, err, block)
		}
		all = append(all, in...)
	}
	return all
}

// manifest returns a new copy of the section's manifest with the given kind and name.
func (d documentation) manifest(kind, name string) manifest {
	d.Helper()
	for _, m := range d.manifests() {
		if m.kind() == kind && m.name() == name {
			return m
		}
	}
	d.Fatalf("%s has no %s %s", d.title, kind, name)
	return nil
}

// command returns the section's command that begins with words.
func (d documentation) command(words ...string) []string {
	d.Helper()
	begin := strings.Join(words, " ")
	for _, command := range d.shell {
		if strings.HasPrefix(strings.Join(command, " ")+" ", begin+" ") {
			return command
		}
	}
	d.Fatalf("%s has no command %q", d.title, begin)
	return nil
}

// The API server accepts the manifests in docs/consumers.md, including every field. It has no
// definitions for the Vault Secrets Operator and the Secrets Store CSI driver, so the test
// verifies only that those manifests are YAML without duplicate keys.
func TestDocumentedManifests(t *testing.T) {
	c := newCluster(t)
	c.define(tools.definitions)
	c.serviceAccount("reports")

	found := make(map[string]int)
	for _, section := range []string{
		"Kubernetes agent injector", "Vault Secrets Operator", "External Secrets Operator", "Secrets Store CSI provider",
	} {
		for _, m := range documented(t, section).manifests() {
			undefined := strings.HasPrefix(m.text("apiVersion"), "secrets.hashicorp.com/") ||
				strings.HasPrefix(m.text("apiVersion"), "secrets-store.csi.x-k8s.io/")
			if m.kind() == "" && m.at("spec", "containers") != nil {
				// A partial pod: add the missing fields.
				m["apiVersion"], m["kind"], m["metadata"] = "v1", "Pod", map[string]any{"name": "reports"}
			}
			if m.kind() == "" {
				continue // Helm chart values
			}
			found[section+": "+m.kind()]++
			if undefined {
				continue
			}
			if err := c.tryApply(m, "&dryRun=All"); err != nil {
				t.Errorf("%s: the %s %s: %v", section, m.kind(), m.name(), err)
			}
		}
	}
	for _, want := range []string{
		"Kubernetes agent injector: Deployment",
		"Vault Secrets Operator: VaultDynamicSecret",
		"External Secrets Operator: VaultDynamicSecret",
		"External Secrets Operator: ExternalSecret",
		"External Secrets Operator: SecretStore",
		"Secrets Store CSI provider: SecretProviderClass",
		"Secrets Store CSI provider: Pod",
	} {
		if found[want] == 0 {
			t.Errorf("%s is not in docs/consumers.md", want)
		}
	}

	// Verify that the API server refuses unknown fields.
	for name, change := range map[string]func() manifest{
		"a Deployment": func() manifest {
			m := documented(t, "Kubernetes agent injector").manifest("Deployment", "reports")
			m.object("spec")["selectors"] = map[string]any{}
			return m
		},
		"a generator with getParameters, which 0.20.4 does not have": func() manifest {
			m := documented(t, "External Secrets Operator").manifest("VaultDynamicSecret", "reports")
			m.object("spec")["getParameters"] = map[string]any{"scopes": []any{"read:data"}}
			return m
		},
	} {
		if err := c.tryApply(change(), "&dryRun=All"); err == nil || !strings.Contains(err.Error(), "field not declared in schema") {
			t.Errorf("%s: got %v, want an error about an unknown field", name, err)
		}
	}
}
