// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
)

func TestRoleRoundTrip(t *testing.T) {
	m := newTestMount(t)
	resp := m.write("roles/app", map[string]any{
		"config":       "prod",
		"audience":     "https://api.example.org/",
		"scopes":       "read:a, read:b read:a",
		"extra_params": map[string]any{"resource": "x y"},
		"min_ttl":      "10m",
		"max_ttl":      3600,
	})
	if resp == nil || len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], `config "prod" does not exist yet`) {
		t.Errorf("got %v, want a warning that the config is missing", resp)
	}
	want := map[string]any{
		"config":         "prod",
		"audience":       "https://api.example.org/",
		"scopes":         []string{"read:a", "read:b"},
		"extra_params":   map[string]string{"resource": "x y"},
		"min_ttl":        int64(600),
		"max_ttl":        int64(3600),
		"generate_lease": false,
	}
	if got := m.read("roles/app"); !reflect.DeepEqual(got, want) {
		t.Errorf("read: got %v, want %v", got, want)
	}

	m.write("roles/app", map[string]any{"min_ttl": 0})
	want["min_ttl"] = int64(0)
	if got := m.read("roles/app"); !reflect.DeepEqual(got, want) {
		t.Errorf("after an update of min_ttl: got %v, want %v", got, want)
	}
	m.write("roles/app", map[string]any{"scopes": ""})
	if got := m.read("roles/app")["scopes"]; len(got.([]string)) != 0 {
		t.Errorf("scopes sent empty: got %v, want none", got)
	}

	m.write("roles/zoo", nil)
	if got, want := m.do(logical.ListOperation, "roles/", nil).Data["keys"], []string{"app", "zoo"}; !slices.Equal(got.([]string), want) {
		t.Errorf("list: got %v, want %v", got, want)
	}
	if got := m.read("roles/zoo")["config"]; got != "default" {
		t.Errorf("config of a role that names none: got %v", got)
	}
	m.do(logical.DeleteOperation, "roles/app", nil)
	if got := m.read("roles/app"); got != nil {
		t.Errorf("after delete: got %v, want nothing", got)
	}
}

func TestRoleRefusesInvalidFields(t *testing.T) {
	cases := []struct {
		name  string
		field string
		value any
		want  string
	}{
		{"config", "config", "a/b", `config "a/b" is not a valid name`},
		{"scope with a quote", "scopes", `read:"a"`, "not a valid scope"},
		{"scope with a backslash", "scopes", `read\a`, "not a valid scope"},
		{"scope beyond ASCII", "scopes", "läsen", "not a valid scope"},
		{"audience with line end", "audience", "https://api/\n", "audience contains a control character"},
		{"extra grant_type", "extra_params", map[string]any{"grant_type": "x"}, `must not contain "grant_type"`},
		{"extra client_id", "extra_params", map[string]any{"client_id": "x"}, `must not contain "client_id"`},
		{"extra client_secret", "extra_params", map[string]any{"Client_Secret": "x"}, `must not contain "Client_Secret"`},
		{"extra assertion", "extra_params", map[string]any{"client_assertion_type": "x"}, `must not contain "client_assertion_type"`},
		{"extra scope", "extra_params", map[string]any{"scope": "x"}, "use the field scopes"},
		{"extra audience", "extra_params", map[string]any{"audience": "x"}, "use the field audience"},
		{"extra nameless", "extra_params", map[string]any{"": "x"}, "without a name"},
		{"min_ttl", "min_ttl", "-5s", "min_ttl"},
		{"max_ttl", "max_ttl", "soon", "max_ttl"},
		{"generate_lease", "generate_lease", "perhaps", "generate_lease"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := newTestMount(t)
			text := m.refused(logical.UpdateOperation, "roles/mine", map[string]any{c.field: c.value})
			if !strings.Contains(text, c.want) {
				t.Errorf("got %q, want it to contain %q", text, c.want)
			}
			if got := m.read("roles/mine"); got != nil {
				t.Errorf("the role was saved: %v", got)
			}
		})
	}
}

func TestRoleWarnsOfImpossibleMinTTL(t *testing.T) {
	m := newTestMount(t)
	m.write("config", testConfig(nil))
	resp := m.write("roles/app", map[string]any{"min_ttl": "2h", "max_ttl": "1h"})
	if resp == nil || len(resp.Warnings) != 1 || !strings.Contains(resp.Warnings[0], "min_ttl of 2h0m0s is longer than the max_ttl") {
		t.Errorf("got %v, want a warning", resp)
	}
}
