// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package clients

import (
	"fmt"
	"maps"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/consumers/scene"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// policy grants the only access that a program needs.
const policy = `path "mojoauth/creds/*" { capabilities = ["read"] }
path "nowhere/creds/*" { capabilities = ["read"] }`

// stage is the environment that the clients of a test share.
type stage struct {
	vault *api.Client // with an operator's token
	oauth *oauthserver.Server
	token string // a Vault token with access to creds
	ca    string // the CA certificate file for Vault
}

func newStage(t testing.TB, vault *harness.Vault, oauth *oauthserver.Server) *stage {
	t.Helper()
	s := &stage{vault: vault.Client, oauth: oauth}
	if err := vault.Sys().PutPolicy("reader", policy); err != nil {
		t.Fatal(err)
	}
	secret, err := vault.Auth().Token().Create(&api.TokenCreateRequest{Policies: []string{"reader"}})
	if err != nil {
		t.Fatal(err)
	}
	s.token = secret.Auth.ClientToken
	for _, variable := range vault.Environment() {
		if ca, ok := strings.CutPrefix(variable, "VAULT_CACERT="); ok {
			s.ca = ca
		}
	}
	return s
}

// role writes a client's role for a purpose and returns the role's name.
func (s *stage) role(t testing.TB, c *client, purpose string, more map[string]any) string {
	t.Helper()
	name := c.role(purpose)
	fields := map[string]any{
		"audience": oauthserver.DataAudience, "scopes": oauthserver.DataScope,
		"generate_lease": c.leased,
		"extra_params":   map[string]any{"role": name}, // identifies the role in token requests
	}
	maps.Copy(fields, more)
	if _, err := s.vault.Logical().Write("mojoauth/roles/"+name, fields); err != nil {
		t.Fatalf("writing the role %s: %v", name, err)
	}
	return name
}

// env returns the environment of a program that reads a role through a proxy and calls an
// API.
func (s *stage) env(vault *recordingProxy, role, apiURL string, calls int, interval time.Duration, more ...string) []string {
	env := []string{
		"VAULT_ADDR=" + vault.URL, "VAULT_TOKEN=" + s.token, "ROLE=" + role, "API_URL=" + apiURL,
		"CALLS=" + strconv.Itoa(calls), fmt.Sprintf("INTERVAL=%g", interval.Seconds()),
	}
	if s.ca != "" {
		env = append(env, "VAULT_CACERT="+s.ca)
	}
	return append(env, more...)
}

// api returns the URL of the protected API.
func (s *stage) api() string { return s.oauth.URL() + oauthserver.DataPath }

// mints returns the number of token requests for a role.
func mints(oauth *oauthserver.Server, role string) (n int) {
	for _, request := range oauth.Requests() {
		if strings.Contains(request.Body+"&", "role="+role+"&") {
			n++
		}
	}
	return n
}

// TestClients verifies that all clients behave as examples/README.md describes.
func TestClients(t *testing.T) {
	world := scene.New(t, time.Hour, nil)
	s := newStage(t, world.Vault, world.OAuth)
	world.Write("config/down", map[string]any{
		"token_url": "http://" + harness.FreeAddress(t) + "/oauth2/token", "client_id": scene.ClientID, "client_secret": scene.ClientSecret,
		"verify_connection": false, "max_retries": 0,
	})
	each(t, "single run", func(t *testing.T, c *client) {
		s.oneRead(t, c)
		s.refusals(t, c)
		s.revoked(t, c)
		s.failures(t, c)
	})
	t.Run("several lifetimes", func(t *testing.T) {
		renewed := s.startRenewals(t)
		s.outage(t)
		renewed()
	})
}

// oneRead verifies that a program makes many calls with one read of Vault.
func (s *stage) oneRead(t *testing.T, c *client) {
	vault := newProxy(t, s.vault.Address(), "", nil)
	role := s.role(t, c, "token", nil)
	c.start(t, s.env(vault, role, s.api(), 20, 0)...).succeeds(20)
	if reads := vault.reads(); len(reads) != 1 {
		t.Errorf("20 calls took %d reads of Vault, want 1", len(reads))
	}
	if n := mints(s.oauth, role); n != 1 {
		t.Errorf("20 calls took %d tokens, want 1", n)
	}
}

// refusals verifies that a program shows Vault's error when it gets no token.
func (s *stage) refusals(t *testing.T, c *client) {
	vault := newProxy(t, s.vault.Address(), "", nil)
	c.start(t, s.env(vault, "nobody", s.api(), 1, 0)...).
		fails(c.status("400"), `role "nobody" does not exist; write roles/nobody to create it`)
	nowhere := "no handler for route"
	if c.dropsText {
		nowhere = "nothing is at nowhere/creds/"
	}
	c.start(t, s.env(vault, "token", s.api(), 1, 0, "MOUNT=nowhere")...).fails("404", nowhere)
	role := s.role(t, c, "down", map[string]any{"config": "down"})
	c.start(t, s.env(vault, role, s.api(), 1, 0)...).fails(c.status("502"), `config "down"`)
}

// revoked verifies that a program gets a newer token when the API refuses a token that has
// not expired.
func (s *stage) revoked(t *testing.T, c *client) {
	vault, guarded := newProxy(t, s.vault.Address(), "", nil), newProxy(t, s.api(), "", refuseFirst())
	role := s.role(t, c, "revoked", nil)
	c.start(t, s.env(vault, role, guarded.URL, 3, 0)...).succeeds(3)
	wantNewer(t, c, vault, guarded)
	if n := mints(s.oauth, role); n != 2 {
		t.Errorf("after a revoked token: got %d mints, want 2", n)
	}
}

// wantNewer verifies that three calls succeed with a newer token after the API refuses the
// first token.
func wantNewer(t *testing.T, c *client, vault, guarded *recordingProxy) {
	t.Helper()
	if calls := guarded.all(); len(calls) != 4 {
		t.Errorf("three calls, the first with a revoked token, took %d requests, want 4", len(calls))
	}
	reads := vault.reads()
	if len(reads) != 1+c.newer {
		t.Fatalf("after a revoked token: got %d reads of Vault, want %d", len(reads), 1+c.newer)
	}
	if got, want := reads[1].query.Get("minted_after"), reads[0].token().Data.LastVaultRotation; got != want || want == "" {
		t.Errorf("after the API refused the token: minted_after is %q, want its last_vault_rotation, %q", got, want)
	}
	if len(reads[0].query) != 0 {
		t.Errorf("the first read has the query %v, want none", reads[0].query)
	}
	if last := reads[len(reads)-1].token().Data.AccessToken; last == reads[0].token().Data.AccessToken || last == "" {
		t.Error("the last read returned no newer token")
	}
}

// failures verifies how many requests a program sends, and how long it waits between them,
// when Vault fails.
func (s *stage) failures(t *testing.T, c *client) {
	role := s.role(t, c, "token", nil)
	for _, test := range []struct {
		status int
		more   []string
		want   int
	}{
		{http.StatusTooManyRequests, nil, c.tries},
		{http.StatusBadGateway, nil, c.tries},
		{http.StatusGatewayTimeout, nil, c.tries},
		{http.StatusBadGateway, []string{"VAULT_MAX_RETRIES=0"}, c.alone},
	} {
		vault := newProxy(t, s.vault.Address(), "", func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			fail(w, test.status)
			return true
		})
		c.start(t, s.env(vault, role, s.api(), 1, 0, test.more...)...).fails(c.status(strconv.Itoa(test.status)), "not now")
		requests := vault.all()
		t.Logf("Vault returns %d, with %q: requests at %s", test.status, test.more, offsets(requests))
		if len(requests) != test.want {
			t.Errorf("Vault returns %d, with %q: got %d requests, want %d", test.status, test.more, len(requests), test.want)
		}
	}

	// Vault specifies how long to wait.
	const patience = 4 * time.Second
	limited := newProxy(t, s.vault.Address(), "", func(n int, w http.ResponseWriter, _ *http.Request) bool {
		if n == 1 {
			w.Header().Set("Retry-After", strconv.Itoa(int(patience.Seconds())))
			fail(w, http.StatusTooManyRequests)
		}
		return n == 1
	})
	p := c.start(t, s.env(limited, role, s.api(), 1, 0)...)
	if c.tries == 1 {
		p.fails(c.status("429"), "not now")
		return
	}
	p.succeeds(1)
	requests := limited.all()
	t.Logf("a Retry-After of %s: requests at %s", patience, offsets(requests))
	if len(requests) != 2 {
		t.Fatalf("Vault returns 429 once: got %d requests, want 2", len(requests))
	}
	if waited := requests[1].at.Sub(requests[0].at); c.waits != (waited >= patience-50*time.Millisecond) {
		t.Errorf("a Retry-After of %s: the program sent the next request after %s, want it to wait that long: %v", patience, waited, c.waits)
	}
}

// offsets returns the time of each request since the first.
func offsets(requests []exchange) (offsets []string) {
	for _, request := range requests {
		offsets = append(offsets, request.at.Sub(requests[0].at).Round(10*time.Millisecond).String())
	}
	return offsets
}

const (
	interval = time.Second
	// On a busy machine, a program may read up to slack later than necessary. It may also
	// appear to read up to early before ttl: it reads its clock before the proxy records the
	// request, and the shell counts whole seconds.
	slack, early = 3 * time.Second, 1500 * time.Millisecond
)

// startOAuth starts an OAuth server whose tokens have the given lifetime, and writes a
// config for it.
func (s *stage) startOAuth(t *testing.T, config string, lifetime time.Duration, more map[string]any) *oauthserver.Server {
	t.Helper()
	oauth, err := oauthserver.New(lifetime, oauthserver.Client{
		ID: scene.ClientID, Secret: scene.ClientSecret,
		Audiences: []string{oauthserver.DataAudience}, Scopes: []string{oauthserver.DataScope},
	})
	if err == nil {
		err = oauth.Start("127.0.0.1:0")
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { oauth.Close() })
	fields := map[string]any{
		"token_url": oauth.TokenURL(), "client_id": scene.ClientID, "client_secret": scene.ClientSecret, "max_requests_per_second": 1000,
	}
	maps.Copy(fields, more)
	if _, err := s.vault.Logical().Write("mojoauth/config/"+config, fields); err != nil {
		t.Fatal(err)
	}
	return oauth
}

// run is a program that calls the API for some time.
type run struct {
	*client
	*program
	role           string
	vault, counted *recordingProxy
}

// startRuns starts all clients, each with its own role and the given additional variables.
func (s *stage) startRuns(t *testing.T, oauth *oauthserver.Server, purpose string, calls int, fields map[string]any, more ...string) (runs []*run) {
	t.Helper()
	for _, c := range available(t) {
		runs = append(runs, &run{
			client: c, role: s.role(t, c, purpose, fields),
			vault: newProxy(t, s.vault.Address(), "", nil), counted: newProxy(t, oauth.URL()+oauthserver.DataPath, "", nil),
		})
	}
	for _, r := range runs {
		// Mint all tokens now, independent of how long a program takes to start.
		if _, err := s.vault.Logical().Read("mojoauth/creds/" + r.role); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range runs {
		r.program = r.start(t, s.env(r.vault, r.role, r.counted.URL, calls, interval, more...)...)
	}
	return runs
}

// waitUntilAllCall waits until every client has called the API.
func waitUntilAllCall(t *testing.T, runs []*run) {
	t.Helper()
	harness.EventuallyWithin(t, 2*time.Minute, "all clients have called the API", func() error {
		for _, r := range runs {
			if len(r.counted.all()) == 0 {
				return fmt.Errorf("%s has not called the API", r.name)
			}
		}
		return nil
	})
}

// verify waits for a run to end and verifies that every call succeeded.
func (r *run) verify(t *testing.T, calls int) {
	t.Helper()
	r.t = t
	r.succeeds(calls)
	for i, call := range r.counted.all() {
		if call.status != http.StatusOK {
			t.Errorf("call %d got %d", i+1, call.status)
		}
	}
}

// startRenewals starts all clients, which call the API for three token lifetimes of 20 s
// each. The function that it returns waits for the clients to end and verifies the results.
func (s *stage) startRenewals(t *testing.T) (verify func()) {
	t.Helper()
	const (
		calls     = int(60 * time.Second / interval)
		threshold = 2 // seconds before the end of the lease when a client reads again; less than R - m, which is 3
	)
	oauth := s.startOAuth(t, "short", 20*time.Second, nil)
	runs := s.startRuns(t, oauth, "renewal", calls, map[string]any{"config": "short"}, fmt.Sprint("EXPIRY_THRESHOLD=", threshold))
	waitUntilAllCall(t, runs) // the next clients start after these have started
	return func() {
		t.Helper()
		for _, r := range runs {
			t.Run("renewal/"+r.name, func(t *testing.T) {
				r.verify(t, calls)
				reads := r.vault.reads()
				var gaps []string
				tokens := map[string]bool{reads[0].token().Data.AccessToken: true}
				for i, read := range reads[:len(reads)-1] {
					answer, next := read.token(), reads[i+1]
					want := time.Duration(answer.Data.TTL) * time.Second
					if r.leased {
						want = time.Duration(max(1, answer.LeaseDuration-threshold)) * time.Second
					}
					gap := next.at.Sub(read.at)
					gaps = append(gaps, fmt.Sprintf("%.1fs after %s", gap.Seconds(), want))
					if gap < want-early || gap > want+interval+slack {
						t.Errorf("read %d was %s after the previous one, want %s to %s", i+2, gap, want-early, want+interval+slack)
					}
					tokens[next.token().Data.AccessToken] = true
				}
				n := mints(oauth, r.role)
				t.Logf("%d calls in %s, %d reads of %d tokens, %d mints; reads %s",
					calls, time.Since(r.started).Round(time.Second), len(reads), len(tokens), n, strings.Join(gaps, ", "))
				// ttl counts whole seconds, so a program may read up to a second before a
				// new token is due. It then gets the old token with a ttl of one second.
				if len(tokens) < 4 || len(reads) > 2*len(tokens) {
					t.Errorf("%d reads in three lifetimes returned %d tokens, want at least 4, with one or two reads each", len(reads), len(tokens))
				}
				// The engine may have minted one token before the program started and another
				// after it ended.
				if n < len(tokens) || n > len(tokens)+2 {
					t.Errorf("got %d mints for %d tokens that the client read", n, len(tokens))
				}
			})
		}
	}
}

// outage verifies that calls continue while the OAuth server is down for part of a token's
// lifetime. The lifetime is 60 s, and a new token is due when 24 s are left. The outage
// begins when all clients have called the API. It ends when each client has read the old
// token again, with at least 15 s left. The engine's back-off is short enough that it
// retries before 6 s are left; below that, it no longer serves the old token.
func (s *stage) outage(t *testing.T) {
	t.Helper()
	const (
		lifetime, minTTL = 60 * time.Second, 24 * time.Second
		calls            = int(75 * time.Second / interval)
	)
	oauth := s.startOAuth(t, "outage", lifetime, map[string]any{"max_retries": 0})
	minted := time.Now()
	// A lease lasts 54 s, and a new token is due 18 s before the lease ends.
	runs := s.startRuns(t, oauth, "outage", calls, map[string]any{"config": "outage", "min_ttl": minTTL.Seconds()}, "EXPIRY_THRESHOLD=15")
	waitUntilAllCall(t, runs)
	if took := time.Since(minted); took > lifetime-minTTL-4*time.Second {
		t.Fatalf("the clients took %s to start: the machine is too slow for this test", took)
	}

	requests := len(oauth.Requests())
	oauth.SetFaults(oauthserver.Faults{Drop: "before"})
	began := time.Now()
	harness.Eventually(t, "all clients have read again", func() error {
		for _, r := range runs {
			if len(r.vault.reads()) < 2 {
				return fmt.Errorf("%s has not read again", r.name)
			}
		}
		return nil
	})
	refused := len(oauth.Requests()) - requests
	oauth.SetFaults(oauthserver.Faults{})
	t.Logf("the OAuth server was down for %s, starting %s after the mint, and refused %d requests",
		time.Since(began).Round(100*time.Millisecond), began.Sub(minted).Round(100*time.Millisecond), refused)
	if refused == 0 {
		t.Error("the OAuth server got no requests while it was down")
	}

	for _, r := range runs {
		t.Run("outage/"+r.name, func(t *testing.T) {
			r.verify(t, calls)
			reads := r.vault.reads()
			first, second, last := reads[0].token(), reads[1].token(), reads[len(reads)-1].token()
			if first.Data.AccessToken != second.Data.AccessToken {
				t.Error("the second read, during the outage, returned a new token")
			}
			if first.Data.AccessToken == last.Data.AccessToken {
				t.Error("the last read, after the outage, did not return a new token")
			}
			t.Logf("%d reads, at %s", len(reads), offsets(reads))
		})
	}
}
