// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package oauthserver

import (
	"encoding/json"
	"net/http"
	"net/url"
	"strings"
	"testing"
)

// The endpoints in the discovery document are the server's own, and work with the
// authentication methods that it lists.
func TestDiscovery(t *testing.T) {
	s := newServer(t)
	if err := s.Start("127.0.0.1:0"); err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	resp, err := http.Get(s.URL() + DiscoveryPath)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	var document struct {
		TokenEndpoint string   `json:"token_endpoint"`
		JWKS          string   `json:"jwks_uri"`
		Methods       []string `json:"token_endpoint_auth_methods_supported"`
	}
	if err := json.NewDecoder(resp.Body).Decode(&document); err != nil {
		t.Fatalf("status %d: %v", resp.StatusCode, err)
	}
	if document.TokenEndpoint != s.TokenURL() {
		t.Errorf("token_endpoint is %q, want %q", document.TokenEndpoint, s.TokenURL())
	}
	if len(document.Methods) == 0 {
		t.Error("the document lists no authentication methods")
	}
	for _, method := range document.Methods {
		form := url.Values{"grant_type": {"client_credentials"}}
		var id, secret string
		switch method {
		case "client_secret_post":
			form.Set("client_id", "client")
			form.Set("client_secret", "secret")
		case "client_secret_basic":
			id, secret = "client", "secret"
		default:
			t.Fatalf("this test does not know the method %q", method)
		}
		req, err := http.NewRequest(http.MethodPost, document.TokenEndpoint, strings.NewReader(form.Encode()))
		if err != nil {
			t.Fatal(err)
		}
		req.Header.Set("Content-Type", "application/x-www-form-urlencoded")
		if id != "" {
			req.SetBasicAuth(id, secret)
		}
		answer, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		answer.Body.Close()
		if answer.StatusCode != http.StatusOK {
			t.Errorf("a token request with %s: status %d, want 200", method, answer.StatusCode)
		}
	}
	keys, err := http.Get(document.JWKS)
	if err != nil {
		t.Fatal(err)
	}
	keys.Body.Close()
	if keys.StatusCode != http.StatusOK {
		t.Errorf("%s: status %d, want 200", document.JWKS, keys.StatusCode)
	}
}
