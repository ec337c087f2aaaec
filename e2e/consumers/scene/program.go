// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package scene

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Program returns what scripts/consumers/NAME.sh prints: the path of a consumer, which it
// builds or installs when it is not there yet.
func Program(t testing.TB, name string) string {
	t.Helper()
	root, err := harness.Root()
	if err != nil {
		t.Fatal(err)
	}
	var out, errs bytes.Buffer
	cmd := exec.Command(filepath.Join(root, "scripts", "consumers", name+".sh"))
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("scripts/consumers/%s.sh: %v\n%s", name, err, errs.String())
	}
	return strings.TrimSpace(out.String())
}

// Token makes a Vault token that may do what the rules say.
func (s *Scene) Token(name, rules string) string {
	s.Helper()
	s.Policy(name, rules)
	secret, err := s.Vault.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{name}, TTL: "1h"})
	if err != nil {
		s.Fatalf("a token with the policy %s: %v", name, err)
	}
	return secret.Auth.ClientToken
}

// CountedAPI is the scene's API, which counts its answers by status.
type CountedAPI struct {
	URL string

	mu       sync.Mutex
	statuses map[int]int
}

// API puts a counter in front of the scene's API.
func (s *Scene) API() *CountedAPI {
	s.Helper()
	target, err := url.Parse(s.OAuth.URL())
	if err != nil {
		s.Fatal(err)
	}
	counted := &CountedAPI{statuses: map[int]int{}}
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(target) },
		ModifyResponse: func(resp *http.Response) error {
			counted.mu.Lock()
			defer counted.mu.Unlock()
			counted.statuses[resp.StatusCode]++
			return nil
		},
	}
	server := httptest.NewServer(proxy)
	s.Cleanup(server.Close)
	counted.URL = server.URL + oauthserver.DataPath
	return counted
}

// Statuses returns how many calls got which status since it was last asked.
func (c *CountedAPI) Statuses() map[int]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	statuses := c.statuses
	c.statuses = map[int]int{}
	return statuses
}
