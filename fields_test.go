// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"fmt"
	"reflect"
	"strings"
	"testing"

	"github.com/hashicorp/vault/sdk/logical"
)

// Vault logs what is wrong with a request, and audits it in the clear. A value of the
// wrong type may be a secret, in its own field or by mistake in another.
func TestFieldErrorsNeverRepeatValues(t *testing.T) {
	for _, c := range []struct {
		path, field string
		value       any
		remedy      string
	}{
		{"config", "client_secret", []any{canary, "x"}, "send it once, as one string"},
		{"config", "client_secret", []string{canary}, "send it once, as one string"},
		{"config", "client_secret", map[string]any{canary: "x"}, "send it once, as one string"},
		{"config/other", "client_secret", map[string]any{"x": canary}, "send it once, as one string"},
		{"config", "client_id", []any{canary, "x"}, "send it once, as one string"},
		{"config", "token_url", []any{"https://u:" + canary + "@h/"}, "send it once, as one string"},
		{"config", "request_timeout", canary, "or a duration such as 10m"},
		{"config", "request_timeout", []any{canary}, "or a duration such as 10m"},
		{"config", "max_retries", canary, "send a whole number"},
		{"config", "max_retries", map[string]any{"x": canary}, "send a whole number"},
		{"config", "verify_connection", canary, "send true or false"},
		{"roles/app", "extra_params", canary, "send an object with string values, or name=value"},
		{"roles/app", "extra_params", []any{canary}, "send an object with string values, or name=value"},
		{"roles/app", "extra_params", map[string]any{"resource": []any{canary}}, "send an object with string values, or name=value"},
		{"roles/app", "scopes", map[string]any{"x": canary}, "send a list of strings or one comma-separated string"},
		{"roles/app", "generate_lease", canary, "send true or false"},
		{"roles/app", "min_ttl", canary, "or a duration such as 10m"},
	} {
		for _, op := range []logical.Operation{logical.UpdateOperation, logical.CreateOperation} {
			m := newTestMount(t)
			data := map[string]any{c.field: c.value}
			if strings.HasPrefix(c.path, "config") {
				data = testConfig(data)
			}
			text := m.refused(op, c.path, data) // an update checks existence first
			if strings.Contains(text, canary) {
				t.Errorf("%s %s of %s: the error contains the value: %q", op, c.field, c.path, text)
			}
			if !strings.Contains(text, c.field+" ") || !strings.Contains(text, c.remedy) {
				t.Errorf("%s %s of %s: got %q, want the field and the remedy", op, c.field, c.path, text)
			}
		}
	}
	m := newTestMount(t)
	m.configure("app", nil)
	for _, field := range []string{"min_ttl", "scopes"} {
		text := m.refused(logical.ReadOperation, "creds/app", map[string]any{field: map[string]any{"x": canary}})
		if strings.Contains(text, canary) || !strings.Contains(text, field+" ") {
			t.Errorf("%s of a read: got %q", field, text)
		}
	}
}

// Terraform and other clients send null for unset fields.
func TestNullCountsAsNotSent(t *testing.T) {
	m := newTestMount(t)
	config := testConfig(map[string]any{
		"token_endpoint_auth_method": "client_secret_basic", "ca_cert": "", "request_timeout": 7, "max_retries": 5,
	})
	role := map[string]any{
		"config": "default", "audience": "a", "scopes": "x,y", "extra_params": "k=v", "min_ttl": 60, "max_ttl": 600, "generate_lease": true,
	}
	for path, fields := range map[string]map[string]any{"config": config, "roles/app": role} {
		m.write(path, fields)
		before := m.read(path)
		for field := range fields {
			if field == "client_secret" || field == "verify_connection" {
				continue // tested separately below
			}
			data := map[string]any{field: nil, "verify_connection": false}
			m.write(path, data)
			if after := m.read(path); !reflect.DeepEqual(after, before) {
				t.Errorf("%s of %s sent as null: got %v, was %v", field, path, after, before)
			}
			if _, there := data[field]; !there {
				t.Errorf("%s: the request itself was changed", field)
			}
		}
	}
	if stored, err := m.configs.load(t.Context(), m.storage, "default"); err != nil || stored.entry.ClientSecret != canary {
		t.Error("the client secret was not kept")
	}
	if got := m.mojo.mints.Load(); got != 0 {
		t.Errorf("%d token requests: verify_connection was lost", got)
	}
	// A new config gets the defaults.
	m.write("config/new", testConfig(map[string]any{"max_retries": nil, "request_timeout": nil}))
	if got := m.read("config/new"); fmt.Sprint(got["max_retries"], got["request_timeout"]) != "2 10" {
		t.Errorf("got %v, want the defaults", got)
	}
	if got := m.creds("app", map[string]any{"scopes": nil, "min_ttl": nil}); got.err != nil {
		t.Errorf("a read with null for its fields: %v", got.err)
	}
}

// A null satisfies a policy that requires client_secret, because Vault sees the
// parameter. If it counted as not sent, the stored secret would stay in use.
func TestNullForTheSecretIsRefused(t *testing.T) {
	m := newTestMount(t)
	for _, path := range []string{"config", "config/new"} {
		for range 2 { // a create, then an update
			text := m.refused(logical.UpdateOperation, path, testConfig(map[string]any{"client_secret": nil}))
			if !strings.Contains(text, "client_secret is null") || !strings.Contains(text, "omit the field") {
				t.Errorf("%s: got %q, want the reason and the remedy", path, text)
			}
			m.write(path, testConfig(nil))
		}
	}
}

// A null does not skip the verification.
func TestNullForVerifyConnectionVerifies(t *testing.T) {
	m := newTestMount(t)
	for _, path := range []string{"config", "config", "config/new"} {
		asked := m.mojo.mints.Load()
		m.write(path, testConfig(map[string]any{"verify_connection": nil}))
		if got := m.mojo.mints.Load() - asked; got != 1 {
			t.Errorf("%s: got %d token requests, want 1", path, got)
		}
	}
}

// Vault checks policies before the engine looks at fields. The existence check runs even
// earlier, and Vault logs its errors, so it must not read the fields.
func TestExistenceCheckReadsNoFields(t *testing.T) {
	m := newTestMount(t)
	m.configure("app", nil)
	for path, exists := range map[string]bool{"config": true, "config/other": false, "roles/app": true, "roles/other": false} {
		for _, data := range []map[string]any{
			{"client_secret": nil, "verify_connection": nil},
			{"client_secret": []any{canary}, "scopes": map[string]any{"x": canary}, "name": "other"},
			{"scopes": strings.Repeat(",", 1<<20), "client_secret": strings.Repeat("x", 1<<20)},
		} {
			checked, got, err := m.HandleExistenceCheck(t.Context(), &logical.Request{
				Operation: logical.UpdateOperation, Path: path, Data: data, Storage: m.storage,
			})
			if !checked || got != exists || err != nil {
				t.Errorf("%s: got %v, %v, %v; want true, %v and no error", path, checked, got, err, exists)
			}
		}
	}
}
