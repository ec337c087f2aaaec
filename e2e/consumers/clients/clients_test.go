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

// policy is all that a program may do.
const policy = `path "mojoauth/creds/*" { capabilities = ["read"] }
path "nowhere/creds/*" { capabilities = ["read"] }`

// stage is what the clients of a test have in common.
type stage struct {
	vault *api.Client // of an operator
	oauth *oauthserver.Server
	token string // that may read creds
	ca    string // of Vault's certificate
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

// role writes a client's role for a purpose, and returns its name.
func (s *stage) role(t testing.TB, c *client, purpose string, more map[string]any) string {
	t.Helper()
	name := c.role(purpose)
	fields := map[string]any{
		"audience": oauthserver.DataAudience, "scopes": oauthserver.DataScope,
		"generate_lease": c.leased,
		"extra_params":   map[string]any{"role": name}, // tells whose token a request is for
	}
	maps.Copy(fields, more)
	if _, err := s.vault.Logical().Write("mojoauth/roles/"+name, fields); err != nil {
		t.Fatalf("writing the role %s: %v", name, err)
	}
	return name
}

// env is the variables for a program that reads a role through a front and calls an API.
func (s *stage) env(vault *front, role, apiURL string, calls int, interval time.Duration, more ...string) []string {
	env := []string{
		"VAULT_ADDR=" + vault.URL, "VAULT_TOKEN=" + s.token, "ROLE=" + role, "API_URL=" + apiURL,
		"CALLS=" + strconv.Itoa(calls), fmt.Sprintf("INTERVAL=%g", interval.Seconds()),
	}
	if s.ca != "" {
		env = append(env, "VAULT_CACERT="+s.ca)
	}
	return append(env, more...)
}

// api is the URL of the protected API.
func (s *stage) api() string { return s.oauth.URL() + oauthserver.DataPath }

// mints counts the token requests for a role.
func mints(oauth *oauthserver.Server, role string) (n int) {
	for _, request := range oauth.Requests() {
		if strings.Contains(request.Body+"&", "role="+role+"&") {
			n++
		}
	}
	return n
}

// TestClients has all clients do what examples/README.md says of them.
func TestClients(t *testing.T) {
	world := scene.New(t, time.Hour, nil)
	s := newStage(t, world.Vault, world.OAuth)
	world.Write("config/down", map[string]any{
		"token_url": "http://" + harness.FreeAddress(t) + "/oauth2/token", "client_id": scene.ClientID, "client_secret": scene.ClientSecret,
		"verify_connection": false, "max_retries": 0,
	})
	each(t, "alone", func(t *testing.T, c *client) {
		s.oneRead(t, c)
		s.refusals(t, c)
		s.revoked(t, c)
		s.failures(t, c)
	})
	t.Run("over lifetimes", func(t *testing.T) {
		renewed := s.startRenewals(t)
		s.outage(t)
		renewed()
	})
}

// oneRead is that one read of Vault is enough for many calls.
func (s *stage) oneRead(t *testing.T, c *client) {
	vault := newFront(t, s.vault.Address(), "", nil)
	role := s.role(t, c, "token", nil)
	c.start(t, s.env(vault, role, s.api(), 20, 0)...).succeeds(20)
	if reads := vault.reads(); len(reads) != 1 {
		t.Errorf("20 calls took %d reads of Vault, want 1", len(reads))
	}
	if n := mints(s.oauth, role); n != 1 {
		t.Errorf("20 calls took %d tokens, want 1", n)
	}
}

// refusals is that the program shows why it has no token, in Vault's words.
func (s *stage) refusals(t *testing.T, c *client) {
	vault := newFront(t, s.vault.Address(), "", nil)
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

// revoked is that a program gets a newer token when the API refuses one before its time.
func (s *stage) revoked(t *testing.T, c *client) {
	vault, guarded := newFront(t, s.vault.Address(), "", nil), newFront(t, s.api(), "", refuseFirst())
	role := s.role(t, c, "revoked", nil)
	c.start(t, s.env(vault, role, guarded.URL, 3, 0)...).succeeds(3)
	wantNewer(t, c, vault, guarded)
	if n := mints(s.oauth, role); n != 2 {
		t.Errorf("a token that was revoked: %d were minted, want 2", n)
	}
}

// wantNewer checks that three calls got a newer token after the first was refused.
func wantNewer(t *testing.T, c *client, vault, guarded *front) {
	t.Helper()
	if calls := guarded.all(); len(calls) != 4 {
		t.Errorf("three calls, the first with a token that was revoked, took %d requests, want 4", len(calls))
	}
	reads := vault.reads()
	if len(reads) != 1+c.newer {
		t.Fatalf("a token that was revoked: %d reads of Vault, want %d", len(reads), 1+c.newer)
	}
	if got, want := reads[1].query.Get("minted_after"), reads[0].token().Data.LastVaultRotation; got != want || want == "" {
		t.Errorf("after the API refused the token: minted_after is %q, want its last_vault_rotation, %q", got, want)
	}
	if len(reads[0].query) != 0 {
		t.Errorf("the first read has the query %v, want none", reads[0].query)
	}
	if last := reads[len(reads)-1].token().Data.AccessToken; last == reads[0].token().Data.AccessToken || last == "" {
		t.Error("the last read brought no newer token")
	}
}

// failures is how often, and for how long, a program asks a Vault that fails.
func (s *stage) failures(t *testing.T, c *client) {
	role := s.role(t, c, "token", nil)
	for _, ask := range []struct {
		status int
		more   []string
		want   int
	}{
		{http.StatusTooManyRequests, nil, c.tries},
		{http.StatusBadGateway, nil, c.tries},
		{http.StatusGatewayTimeout, nil, c.tries},
		{http.StatusBadGateway, []string{"VAULT_MAX_RETRIES=0"}, c.alone},
	} {
		vault := newFront(t, s.vault.Address(), "", func(_ int, w http.ResponseWriter, _ *http.Request) bool {
			fail(w, ask.status)
			return true
		})
		c.start(t, s.env(vault, role, s.api(), 1, 0, ask.more...)...).fails(c.status(strconv.Itoa(ask.status)), "not now")
		requests := vault.all()
		t.Logf("a Vault that answers %d, with %q: requests at %s", ask.status, ask.more, offsets(requests))
		if len(requests) != ask.want {
			t.Errorf("a Vault that answers %d, with %q: %d requests, want %d", ask.status, ask.more, len(requests), ask.want)
		}
	}

	// A Vault that says how long to wait.
	const patience = 4 * time.Second
	limited := newFront(t, s.vault.Address(), "", func(n int, w http.ResponseWriter, _ *http.Request) bool {
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
		t.Fatalf("a Vault that answers 429 once: %d requests, want 2", len(requests))
	}
	if waited := requests[1].at.Sub(requests[0].at); c.waits != (waited >= patience-50*time.Millisecond) {
		t.Errorf("a Retry-After of %s: the next request came after %s; want it to wait that long: %v", patience, waited, c.waits)
	}
}

// offsets tells when requests came, from the first on.
func offsets(requests []exchange) (offsets []string) {
	for _, request := range requests {
		offsets = append(offsets, request.at.Sub(requests[0].at).Round(10*time.Millisecond).String())
	}
	return offsets
}

const (
	interval = time.Second
	// slack is how much later than it has to a program may read, on a busy machine. The
	// shell counts whole seconds, and none reads before ttl by its own clock, which it reads
	// before the request has come here.
	slack, early = 3 * time.Second, 1500 * time.Millisecond
)

// startOAuth starts an OAuth server whose tokens live that long, and writes a config for it.
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
	vault, counted *front
}

// startRuns starts all clients, each with a role of its own, and with more variables.
func (s *stage) startRuns(t *testing.T, oauth *oauthserver.Server, purpose string, calls int, fields map[string]any, more ...string) (runs []*run) {
	t.Helper()
	for _, c := range available(t) {
		runs = append(runs, &run{
			client: c, role: s.role(t, c, purpose, fields),
			vault: newFront(t, s.vault.Address(), "", nil), counted: newFront(t, oauth.URL()+oauthserver.DataPath, "", nil),
		})
	}
	for _, r := range runs {
		// All their tokens are minted now, however long a program takes to start.
		if _, err := s.vault.Logical().Read("mojoauth/creds/" + r.role); err != nil {
			t.Fatal(err)
		}
	}
	for _, r := range runs {
		r.program = r.start(t, s.env(r.vault, r.role, r.counted.URL, calls, interval, more...)...)
	}
	return runs
}

// waitUntilAllCall waits until each has called the API once.
func waitUntilAllCall(t *testing.T, runs []*run) {
	t.Helper()
	harness.EventuallyWithin(t, 2*time.Minute, "all clients have called the API", func() error {
		for _, r := range runs {
			if len(r.counted.all()) == 0 {
				return fmt.Errorf("%s has not", r.name)
			}
		}
		return nil
	})
}

// judge waits for the end of a run, in which no call may have been refused.
func (r *run) judge(t *testing.T, calls int) {
	t.Helper()
	r.t = t
	r.succeeds(calls)
	for i, call := range r.counted.all() {
		if call.status != http.StatusOK {
			t.Errorf("call %d got %d", i+1, call.status)
		}
	}
}

// startRenewals has all clients call the API for three lifetimes of their tokens, of 20 s.
// The function that it returns waits for their end, and judges them.
func (s *stage) startRenewals(t *testing.T) (judge func()) {
	t.Helper()
	const (
		calls     = int(60 * time.Second / interval)
		threshold = 2 // what a leased read leaves until the next, in seconds: below R - m, which is 3
	)
	oauth := s.startOAuth(t, "short", 20*time.Second, nil)
	runs := s.startRuns(t, oauth, "renewal", calls, map[string]any{"config": "short"}, fmt.Sprint("EXPIRY_THRESHOLD=", threshold))
	waitUntilAllCall(t, runs) // what starts next has the machine for itself then
	return func() {
		t.Helper()
		for _, r := range runs {
			t.Run("renewal/"+r.name, func(t *testing.T) {
				r.judge(t, calls)
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
						t.Errorf("read %d came %s after the one before, want %s to %s", i+2, gap, want-early, want+interval+slack)
					}
					tokens[next.token().Data.AccessToken] = true
				}
				n := mints(oauth, r.role)
				t.Logf("%d calls in %s, %d reads of %d tokens, %d mints; reads %s",
					calls, time.Since(r.started).Round(time.Second), len(reads), len(tokens), n, strings.Join(gaps, ", "))
				// A read may come as much as a second before a new token is due, as ttl
				// counts whole seconds, and get another ttl of a second.
				if len(tokens) < 4 || len(reads) > 2*len(tokens) {
					t.Errorf("%d reads in three lifetimes brought %d tokens, want 4 at least, with one read or two each", len(reads), len(tokens))
				}
				// The engine may have minted one before the program came, and one after it.
				if n < len(tokens) || n > len(tokens)+2 {
					t.Errorf("%d tokens were minted for %d that were read", n, len(tokens))
				}
			})
		}
	}
}

// outage is that calls go on while the OAuth server is down for a part of a token's
// lifetime. A token lives for 60 s, and a new one is due when 24 s are left. The outage
// begins when all clients have called the API, and ends when each has read the old token
// again, with 15 s left at the latest. The engine's back-off has it try again before 6 s
// are left, when it would serve the old one no longer.
func (s *stage) outage(t *testing.T) {
	t.Helper()
	const (
		lifetime, minTTL = 60 * time.Second, 24 * time.Second
		calls            = int(75 * time.Second / interval)
	)
	oauth := s.startOAuth(t, "outage", lifetime, map[string]any{"max_retries": 0})
	minted := time.Now()
	// A lease is 54 s, and a new token is due 18 s before its end.
	runs := s.startRuns(t, oauth, "outage", calls, map[string]any{"config": "outage", "min_ttl": minTTL.Seconds()}, "EXPIRY_THRESHOLD=15")
	waitUntilAllCall(t, runs)
	if took := time.Since(minted); took > lifetime-minTTL-4*time.Second {
		t.Fatalf("it took the clients %s to start: the machine is too slow for this test", took)
	}

	requests := len(oauth.Requests())
	oauth.SetFaults(oauthserver.Faults{Drop: "before"})
	began := time.Now()
	harness.Eventually(t, "all clients have read again", func() error {
		for _, r := range runs {
			if len(r.vault.reads()) < 2 {
				return fmt.Errorf("%s has not", r.name)
			}
		}
		return nil
	})
	refused := len(oauth.Requests()) - requests
	oauth.SetFaults(oauthserver.Faults{})
	t.Logf("the OAuth server was down for %s, from %s after the mint on, and refused %d requests",
		time.Since(began).Round(100*time.Millisecond), began.Sub(minted).Round(100*time.Millisecond), refused)
	if refused == 0 {
		t.Error("the OAuth server was asked for nothing while it was down")
	}

	for _, r := range runs {
		t.Run("outage/"+r.name, func(t *testing.T) {
			r.judge(t, calls)
			reads := r.vault.reads()
			first, second, last := reads[0].token(), reads[1].token(), reads[len(reads)-1].token()
			if first.Data.AccessToken != second.Data.AccessToken {
				t.Error("the second read, in the outage, brought a new token")
			}
			if first.Data.AccessToken == last.Data.AccessToken {
				t.Error("after the outage there was no new token")
			}
			t.Logf("%d reads, at %s", len(reads), offsets(reads))
		})
	}
}
