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

// Program runs scripts/consumers/NAME.sh and returns the path that it prints. The script
// builds or installs the consumer if necessary.
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

// Token writes a policy with the given rules and returns a Vault token with that policy.
func (s *Scene) Token(name, rules string) string {
	s.Helper()
	s.Policy(name, rules)
	secret, err := s.Vault.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{name}, TTL: "1h"})
	if err != nil {
		s.Fatalf("creating a token with the policy %s: %v", name, err)
	}
	return secret.Auth.ClientToken
}

// CountedAPI counts the responses of the scene's API by status.
type CountedAPI struct {
	URL string

	mu       sync.Mutex
	statuses map[int]int
}

// API starts a proxy for the scene's API that counts responses.
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

// Statuses returns the number of responses by status since the previous call to Statuses.
func (c *CountedAPI) Statuses() map[int]int {
	c.mu.Lock()
	defer c.mu.Unlock()
	statuses := c.statuses
	c.statuses = map[int]int{}
	return statuses
}
