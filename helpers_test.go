// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"cmp"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/helper/testhelpers/schema"
	"github.com/hashicorp/vault/sdk/logical"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/internal/gate"
)

// canary is the client secret in tests. It must not turn up anywhere.
const canary = "canary-client-secret-7f3a"

// testMount is a mount of the engine with the operations that tests use.
type testMount struct {
	t *testing.T
	*backend
	storage *countingStorage
	mojo    *standIn
}

// newTestMount returns a mount whose tokens come from a standIn.
func newTestMount(t *testing.T) *testMount {
	t.Helper()
	mojo := &standIn{lifetime: time.Hour}
	return newTestMountWith(t, mojo, mojo.client)
}

func newTestMountWith(t *testing.T, mojo *standIn, newClient clientFactory) *testMount {
	t.Helper()
	return newTestNode(t, mojo, newClient, &countingStorage{Storage: &logical.InmemStorage{}}, logical.TestSystemView())
}

// newTestNode returns a mount on one node of a cluster. All nodes share storage.
func newTestNode(t *testing.T, mojo *standIn, newClient clientFactory, storage *countingStorage, system logical.SystemView) *testMount {
	t.Helper()
	m := &testMount{t: t, backend: newBackend(newClient), storage: storage, mojo: mojo}
	conf := &logical.BackendConfig{
		StorageView: m.storage,
		Logger:      hclog.NewNullLogger(),
		System:      system,
	}
	if err := m.Setup(context.Background(), conf); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Cleanup(context.Background()) })
	return m
}

// request sends a request as Vault would, checks the response against the path's response
// schema, and returns it.
func (m *testMount) request(op logical.Operation, path string, data map[string]any) (*logical.Response, error) {
	m.t.Helper()
	req := &logical.Request{Operation: op, Path: path, Data: data, Storage: m.storage}
	if op == logical.UpdateOperation {
		// Vault calls this to distinguish a create from an update.
		found, exists, err := m.HandleExistenceCheck(context.Background(), req)
		if user := (errutil.UserError{}); errors.As(err, &user) {
			return logical.ErrorResponse(user.Err), nil // as Vault does
		} else if err != nil {
			return nil, err
		} else if found && !exists {
			req.Operation = logical.CreateOperation
		}
	}
	resp, err := m.HandleRequest(context.Background(), req)
	if err == nil && resp != nil && !resp.IsError() {
		schema.ValidateResponse(m.t, schema.GetResponseSchema(m.t, m.Route(path), req.Operation), resp, true)
	}
	return resp, err
}

// do is like request, but the request must succeed.
func (m *testMount) do(op logical.Operation, path string, data map[string]any) *logical.Response {
	m.t.Helper()
	resp, err := m.request(op, path, data)
	if err != nil {
		m.t.Fatalf("%s %s: %v", op, path, err)
	}
	if resp.IsError() {
		m.t.Fatalf("%s %s: %v", op, path, resp.Error())
	}
	return resp
}

func (m *testMount) write(path string, data map[string]any) *logical.Response {
	m.t.Helper()
	return m.do(logical.UpdateOperation, path, data)
}

// read returns the data at path, or nil if there is none.
func (m *testMount) read(path string) map[string]any {
	m.t.Helper()
	if resp := m.do(logical.ReadOperation, path, nil); resp != nil {
		return resp.Data
	}
	return nil
}

// refused sends a request that must fail with an error response, and returns the error
// text.
func (m *testMount) refused(op logical.Operation, path string, data map[string]any) string {
	m.t.Helper()
	resp, err := m.request(op, path, data)
	if err != nil {
		m.t.Fatalf("%s %s: got the error %v, want an error response (a 400)", op, path, err)
	}
	if !resp.IsError() {
		m.t.Fatalf("%s %s: got %v, want an error response", op, path, resp)
	}
	return resp.Error().Error()
}

// configure writes a config, and a role of the given name that uses it.
func (m *testMount) configure(role string, fields map[string]any) {
	m.t.Helper()
	m.write("config", testConfig(nil))
	m.write("roles/"+role, fields)
}

// testConfig returns the fields of a config that is not verified.
func testConfig(more map[string]any) map[string]any {
	data := map[string]any{
		"token_url":         "https://project.auth.mojoauth.test/oauth2/token",
		"client_id":         "client",
		"client_secret":     canary,
		"verify_connection": false,
	}
	for k, v := range more {
		data[k] = v
	}
	return data
}

// standIn mints in place of MojoAuth. Each token has a number and an owner.
type standIn struct {
	mints   atomic.Int64
	unpaced bool // requests don't wait for turns: for thousands of roles in real time

	mu       sync.Mutex
	lifetime time.Duration // reported with each token
	grant    string        // scope granted, if not the one requested
	latency  time.Duration
	fail     error
	failFor  func(tokenRequest) error
	respond  func(tokenRequest) (latency time.Duration, fail error) // replaces the three above
	deaf     chan struct{}                                          // requests hang until it is closed, even after their context is canceled
	alter    func(*token)                                           // changes a token before it is returned
	requests []tokenRequest
	sent     []time.Time // when each request arrived
	busy     int         // requests in progress
	peak     int         // the most requests in progress at any time
}

type standInClient struct {
	mojo   *standIn
	config configEntry
}

func (s *standIn) client(config *configEntry) (minter, error) {
	return &standInClient{s, *config}, nil
}

// testTurn lets every request leave immediately, and records the outcome. A throttled
// request gets one more turn, but no third.
type testTurn struct {
	answers   []gate.Answer
	asked     []time.Duration // by Retry-After
	throttled int
}

var errNoTurn = errors.New("no turn left")

func (t *testTurn) wait(ctx context.Context) error {
	if t.throttled > 1 {
		return errNoTurn
	}
	return ctx.Err()
}

func (t *testTurn) answered(how gate.Answer, retryAfter time.Duration) {
	t.answers, t.asked = append(t.answers, how), append(t.asked, retryAfter)
	if how == gate.Throttled {
		t.throttled++
	}
}

// set changes the stand-in's behavior from now on.
func (s *standIn) set(change func(*standIn)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	change(s)
}

func (s *standIn) last() tokenRequest {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.requests[len(s.requests)-1]
}

// since returns when the requests after the first n arrived.
func (s *standIn) since(n int64) []time.Time {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.sent[n:])
}

func (c *standInClient) mint(ctx context.Context, req tokenRequest, leave departures) (*token, error) {
	if c.mojo.unpaced {
		return c.ask(ctx, req)
	}
	for {
		if err := leave.wait(ctx); err != nil {
			return nil, err
		}
		tok, err := c.ask(ctx, req)
		var failed *mintError
		errors.As(err, &failed)
		leave.answered(failed.answer())
		if failed == nil || !failed.throttled() {
			return tok, err
		}
	}
}

func (c *standInClient) ask(ctx context.Context, req tokenRequest) (*token, error) {
	s := c.mojo
	n := s.mints.Add(1)
	sent := time.Now()
	s.mu.Lock()
	s.requests, s.sent = append(s.requests, req), append(s.sent, sent)
	s.busy++
	s.peak = max(s.peak, s.busy)
	latency, fail, failFor, respond, deaf := s.latency, s.fail, s.failFor, s.respond, s.deaf
	s.mu.Unlock()
	defer s.set(func(s *standIn) { s.busy-- })

	if deaf != nil {
		<-deaf
	}
	if respond != nil {
		latency, fail = respond(req)
		failFor = nil
	}
	if latency > 0 {
		select {
		case <-time.After(latency):
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if failFor != nil {
		fail = failFor(req)
	}
	if fail != nil {
		return nil, fail
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	tok := &token{
		accessToken: fmt.Sprintf("token-%d-%s-%s", n, c.config.ClientID, c.config.ClientSecret[:6]),
		tokenType:   "Bearer",
		scope:       cmp.Or(s.grant, joinScopes(req.scopes)),
		mintedAt:    sent,
		reported:    s.lifetime,
	}
	if s.alter != nil {
		s.alter(tok)
	}
	return tok, nil
}

// kept counts what a mount has in memory that grows with reads.
type kept struct {
	slots     int // of roles
	narrowed  int // slots of narrowed scopes
	upstreams int // configs in use: their clients and back-offs
	accounts  int // configs in telemetry
}

// kept counts what the mount has in memory. It is the only source for tests of what the
// engine frees.
func (m *testMount) kept() kept {
	m.telemetry.mu.Lock()
	accounts := len(m.telemetry.configs)
	m.telemetry.mu.Unlock()
	m.tokens.mu.RLock()
	defer m.tokens.mu.RUnlock()
	k := kept{upstreams: len(m.tokens.upstreams), accounts: accounts}
	for _, of := range m.tokens.slots {
		for key := range of {
			if key.narrowed == "" {
				k.slots++
			} else {
				k.narrowed++
			}
		}
	}
	return k
}

// patiently reads creds with a deadline of an hour, and returns how long that took.
func (m *testMount) patiently(role string, query map[string]any) (got, time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Hour)
	defer cancel()
	began := time.Now()
	return m.credsCtx(ctx, role, query), time.Since(began)
}

// subsets returns n scope subsets, none of them empty and none with all scopes.
func subsets(scopes []string, n int) [][]string {
	var sets [][]string
	for mask := 1; mask < 1<<len(scopes)-1 && len(sets) < n; mask++ {
		var set []string
		for i, scope := range scopes {
			if mask&(1<<i) != 0 {
				set = append(set, scope)
			}
		}
		sets = append(sets, set)
	}
	return sets
}

// manyScopes returns n scopes.
func manyScopes(n int) []string {
	scopes := make([]string, n)
	for i := range scopes {
		scopes[i] = fmt.Sprintf("s%d", i)
	}
	return scopes
}

// countingStorage counts operations, and can be made to fail them.
type countingStorage struct {
	logical.Storage
	operations atomic.Int64
	fail       atomic.Pointer[error]
	// afterGet, if set, runs in each Get after the read.
	afterGet atomic.Pointer[func(key string)]
}

func (s *countingStorage) count() error {
	s.operations.Add(1)
	if err := s.fail.Load(); err != nil {
		return *err
	}
	return nil
}

func (s *countingStorage) Get(ctx context.Context, key string) (*logical.StorageEntry, error) {
	if err := s.count(); err != nil {
		return nil, err
	}
	entry, err := s.Storage.Get(ctx, key)
	if hook := s.afterGet.Load(); hook != nil {
		(*hook)(key)
	}
	return entry, err
}

func (s *countingStorage) Put(ctx context.Context, e *logical.StorageEntry) error {
	if err := s.count(); err != nil {
		return err
	}
	return s.Storage.Put(ctx, e)
}

func (s *countingStorage) Delete(ctx context.Context, key string) error {
	if err := s.count(); err != nil {
		return err
	}
	return s.Storage.Delete(ctx, key)
}

func (s *countingStorage) List(ctx context.Context, prefix string) ([]string, error) {
	if err := s.count(); err != nil {
		return nil, err
	}
	return s.Storage.List(ctx, prefix)
}

// discardLog is for servers with expected errors.
func discardLog() *log.Logger { return log.New(io.Discard, "", 0) }

// Most tests run in a synctest bubble: time is the bubble's own and passes only when all
// goroutines wait, and Wait returns when none of them can continue.

// bubble runs a test of a mount in a bubble, and closes the mount in it.
func bubble(t *testing.T, test func(m *testMount)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		m := newTestMount(t)
		test(m)
	})
}

// got is the result of a read of creds.
type got struct {
	token    string
	ttl      int64
	warnings []string
	err      error
}

func (m *testMount) creds(role string, query map[string]any) got {
	return m.credsCtx(context.Background(), role, query)
}

func (m *testMount) credsCtx(ctx context.Context, role string, query map[string]any) got {
	resp, err := m.HandleRequest(ctx, &logical.Request{
		Operation: logical.ReadOperation, Path: "creds/" + role, Data: query, Storage: m.storage,
	})
	switch {
	case err != nil:
		return got{err: err}
	case resp.IsError():
		return got{err: resp.Error()}
	}
	return got{token: resp.Data["access_token"].(string), ttl: resp.Data["ttl"].(int64), warnings: resp.Warnings}
}

// wantToken reads a token, and checks its number, which the stand-in increments, and that
// no other tokens were minted.
func (m *testMount) wantToken(role string, number int64) got {
	m.t.Helper()
	got := m.creds(role, nil)
	if got.err != nil {
		m.t.Fatalf("reading %s: %v", role, got.err)
	}
	if want := fmt.Sprintf("token-%d-", number); !strings.HasPrefix(got.token, want) {
		m.t.Errorf("got %s, want %s…", got.token, want)
	}
	return got
}

func (m *testMount) wantMints(n int64) {
	m.t.Helper()
	if got := m.mojo.mints.Load(); got != n {
		m.t.Errorf("got %d token requests, want %d", got, n)
	}
}

// wantStatus checks that err has the given status as Vault sees it over gRPC, where only
// an unwrapped CodedError keeps it.
func wantStatus(t *testing.T, err error, status int, parts ...string) {
	t.Helper()
	coded, ok := err.(logical.HTTPCodedError) //nolint:errorlint // it must not be wrapped
	if !ok || coded.Code() != status {
		t.Errorf("got %v (%T), want an unwrapped error with status %d", err, err, status)
		return
	}
	for _, part := range parts {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("got %q, want it to contain %q", err, part)
		}
	}
}

var errDown = &mintError{class: classServerError, status: http.StatusServiceUnavailable}

// elsewhere runs do on another node with the same storage, and then invalidates the
// changed keys on this one.
func (m *testMount) elsewhere(do func(other *testMount), keys ...string) {
	m.t.Helper()
	do(newTestNode(m.t, m.mojo, m.mojo.client, m.storage, logical.TestSystemView()))
	for _, key := range keys {
		m.InvalidateKey(context.Background(), key)
	}
}

// storedRole returns the role as it is in storage.
func (m *testMount) storedRole(name string) roleEntry {
	m.t.Helper()
	stored, err := m.storage.Storage.Get(context.Background(), rolePrefix+name)
	if err != nil || stored == nil {
		m.t.Fatalf("loading role %s: %v, %v", name, stored, err)
	}
	var role roleEntry
	if err := stored.DecodeJSON(&role); err != nil {
		m.t.Fatal(err)
	}
	return role
}

// jwt returns something that looks like a signed JWT with the given claims.
func jwt(claims string) string {
	encode := base64.RawURLEncoding.EncodeToString
	return encode([]byte(`{"alg":"RS256"}`)) + "." + encode([]byte(claims)) + "." + encode([]byte("signature"))
}
