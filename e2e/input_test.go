// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
)

// Someone who may write the config but does not know the client secret cannot redirect
// it, whatever they send instead of it.
func TestSecretIsNotRedirected(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(map[string]any{"token_url": "https://login.api.example/oauth2/token", "verify_connection": false}))
	before := w.read("config").Data

	// A policy that requires the secret counts a null as sent.
	w.policy("writer", `
path "mojoauth/config" {
  capabilities        = ["create", "update"]
  required_parameters = ["client_secret"]
}`)
	writer := w.as(&api.TokenCreateRequest{Policies: []string{"writer"}})
	for body, words := range map[string][]string{
		`{"token_url": "https://login.api.example/oauth2/token?x=1", "client_secret": null, "verify_connection": false}`: {"client_secret is null"},
		`{"token_url": "https://login.api.example/oauth2/token?x=1", "client_secret": "", "verify_connection": false}`:   {"client_secret is required"},
	} {
		_, err := writer.Logical().WriteBytes("mojoauth/config", []byte(body))
		w.wantError(err, http.StatusBadRequest, words...)
	}
	_, err := writer.Logical().WriteBytes("mojoauth/config", []byte(`{"client_id": "other", "verify_connection": false}`))
	w.wantError(err, http.StatusForbidden)

	for _, change := range []map[string]any{
		{"token_url": "https://log\u0130n.api.example/oauth2/token"},
		{"token_url": "https://log%C4%B0n.api.example/oauth2/token"},
		{"token_url": "https://login.api.example:443/oauth2/token"},
		{"token_url": "https://LOGIN.api.example/oauth2/token"},
		{"token_url": "https://login.api.example/oauth2/token?x=1"},
		{"ca_cert": harness.NewAuthority(t).PEM},
	} {
		for field := range change {
			change["verify_connection"] = false
			_, err := w.vault.Logical().Write("mojoauth/config", change)
			w.wantError(err, http.StatusBadRequest, field+" ")
			break
		}
	}
	if after := w.read("config").Data; fmt.Sprint(after) != fmt.Sprint(before) {
		t.Errorf("the config changed to %v, was %v", after, before)
	}
	w.noCanary()
}

// A null counts as not sent, also for verify_connection: it does not skip the
// verification.
func TestNullIsNotSent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	tried := len(w.oauth.Requests())
	fields, err := json.Marshal(w.config(map[string]any{
		"verify_connection": nil, "max_retries": nil, "ca_cert": nil, "request_timeout": nil, "token_endpoint_auth_method": nil,
	}))
	if err != nil {
		t.Fatal(err)
	}
	for i, path := range []string{"config", "config/new"} { // an update, then a create
		if _, err := w.vault.Logical().WriteBytes("mojoauth/"+path, fields); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		if got := len(w.oauth.Requests()) - tried; got != i+1 {
			t.Errorf("%s: got %d token requests, want %d: null skipped the verification", path, got, i+1)
		}
	}
	_, err = w.vault.Logical().WriteBytes("mojoauth/config", []byte(`{"client_secret": "wrong", "verify_connection": null}`))
	w.wantError(err, http.StatusBadRequest, "was not saved", "invalid_client")
	w.noCanary()
}

// A name means the same to the engine as to Vault's policies.
func TestNamesThroughVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	w.policy("all", `path "mojoauth/*" { capabilities = ["create", "read", "update", "delete", "list"] }`)
	w.policy("none", `path "mojoauth/status" { capabilities = ["read"] }`)
	all, none := w.as(&api.TokenCreateRequest{Policies: []string{"all"}}), w.as(&api.TokenCreateRequest{Policies: []string{"none"}})
	for name, word := range map[string]string{"APP": "lower case", "a..b": `".."`, strings.Repeat("a", 129): "128 characters", "a@b": "not a valid name"} {
		for _, on := range []struct{ method, prefix string }{
			{http.MethodPut, "config/"}, {http.MethodGet, "config/"}, {http.MethodDelete, "config/"},
			{http.MethodPut, "roles/"}, {http.MethodGet, "roles/"}, {http.MethodDelete, "roles/"},
			{http.MethodGet, "creds/"}, {http.MethodPut, "rotate-role/"},
		} {
			_, err := request(all, on.method, on.prefix+name)
			w.wantError(err, http.StatusBadRequest, word)
			_, err = request(none, on.method, on.prefix+name)
			w.wantError(err, http.StatusForbidden)
		}
		_, err := w.vault.Logical().Write("mojoauth/roles/other", map[string]any{"config": name})
		w.wantError(err, http.StatusBadRequest, word)
	}
	// Requests without permission cause no errors in Vault's log.
	if strings.Contains(w.vault.Log(t), "failed to run existence check") {
		t.Error("an invalid name caused an error in Vault's log")
	}
}

// request sends a request to a path of the engine.
func request(client *api.Client, method, path string) (*api.Response, error) {
	req := client.NewRequest(method, "/v1/mojoauth/"+path)
	return client.RawRequest(req) //nolint:staticcheck // there is no other way to send a path verbatim
}

// Whatever a request contains and however large it is, the response takes about as long
// as Vault takes to pass the request on, and other reads continue.
func TestHugeRequestsThroughVault(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.write("config", w.config(nil))
	w.write("roles/app", role(nil))
	scopes := make([]string, 0, 110_000)
	for i := range cap(scopes) {
		scopes = append(scopes, fmt.Sprintf("s%05d", i))
	}
	many := strings.Join(scopes, ",") // 990 KB with its commas encoded
	const allowed = 10 * time.Second  // it once took 75 s
	timed := func(what string, do func() error, parts ...string) {
		t.Helper()
		began := time.Now()
		err := do()
		if took := time.Since(began); took > allowed {
			t.Errorf("%s took %s", what, took)
		}
		w.wantError(err, http.StatusBadRequest, parts...)
	}
	timed("a read with many scopes", func() error {
		_, err := w.vault.Logical().ReadWithData("mojoauth/creds/app", url.Values{"scopes": {many}})
		return err
	}, "scopes ", "4096 bytes")
	timed("a role with many scopes", func() error {
		_, err := w.vault.Logical().Write("mojoauth/roles/app", map[string]any{"scopes": many})
		return err
	}, "scopes ", "4096 bytes")
	timed("a role with long parameters", func() error {
		_, err := w.vault.Logical().Write("mojoauth/roles/app", map[string]any{"extra_params": map[string]any{"a": many}})
		return err
	}, "extra_params ", "4096 bytes")
	timed("a role with a long audience", func() error {
		_, err := w.vault.Logical().Write("mojoauth/roles/app", map[string]any{"audience": many})
		return err
	}, "audience ", "2048 bytes")
	timed("a config with a long secret", func() error {
		_, err := w.vault.Logical().Write("mojoauth/config", map[string]any{"client_secret": many})
		return err
	}, "client_secret ", "4096 bytes")
	w.token("app")
}
