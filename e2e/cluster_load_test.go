// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/http"
	"net/url"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/vault/api"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

// Tokens of the role "short" are valid for 90 s, and due with 60 s left: a frequent
// reader always has one that outlasts any of the faults. Tokens of the other roles are
// valid for an hour, so none is requested again, whatever happens.
const (
	shortLifetime = 90 * time.Second
	shortMinTTL   = 60 * time.Second
)

// longRoles are the roles with one-hour tokens, and their scopes.
var longRoles = map[string]string{"long-read": "read:data", "long-write": "write:data", "long-both": "read:data write:data"}

// clusterWorld is a cluster under a constant load of reads and writes.
type clusterWorld struct {
	testing.TB
	name    string // prefix of the names of what is written
	cluster *harness.Cluster
	mount   string // where the engine is mounted; "" means mojoauth
	oauth   *oauthserver.Server
	seed    uint64
	clients map[*harness.Vault]*api.Client // their responses are not kept

	binary string                    // of the running plugin
	static map[string]map[string]any // data at the paths that are not rewritten

	reading sync.RWMutex // read-locked during each read of a token
	readers []*reader

	writing sync.RWMutex // read-locked during each write
	writers []*writer
	strikes []strike     // so far
	half    atomic.Int64 // 0 or 1: which half of the paths is written
	filler  *writer      // writes large roles when told to

	stop chan struct{}
	work sync.WaitGroup
}

// newClusterWorld starts a cluster of three nodes with the given plugin binary and
// version at mojoauth/, and puts it under load.
func newClusterWorld(t testing.TB, binary, version string, seed uint64) *clusterWorld {
	t.Helper()
	w := &clusterWorld{TB: t, name: "written", cluster: harness.StartCluster(t, vaultBinary, pluginDir, 3), seed: seed, binary: binary}
	short := demoClient("short", canary)
	short.Lifetime = shortLifetime + time.Second // the server rounds down
	w.oauth = startOAuthFor(t, short, demoClient("long", canary))
	active := w.cluster.Active(t)
	active.Register(t, pluginDir, binary, pluginName, version)
	w.cluster.Enable(t, "mojoauth", pluginName, version)

	for _, name := range []string{"short", "long"} {
		w.write("config/"+name, map[string]any{"token_url": w.oauth.TokenURL(), "client_id": name, "client_secret": canary})
	}
	w.write("roles/short", role(map[string]any{
		"config": "short", "min_ttl": int(shortMinTTL.Seconds()), "extra_params": map[string]any{"role": "short"}, // for requestsFor
	}))
	w.write("roles/rotated", role(map[string]any{"config": "short"})) // never read
	for name, scopes := range longRoles {
		w.write("roles/"+name, role(map[string]any{"config": "long", "scopes": scopes}))
	}
	w.connect()
	w.static = make(map[string]map[string]any)
	for _, path := range []string{"config/short", "config/long", "roles/short", "roles/rotated", "roles/long-read"} {
		w.static[path] = w.read(active, path)
	}
	w.startLoad()
	return w
}

// connect creates the clients.
func (w *clusterWorld) connect() {
	w.Helper()
	w.clients = make(map[*harness.Vault]*api.Client)
	for _, node := range w.cluster.Nodes {
		w.clients[node] = node.Reader(w, 20*time.Second)
	}
}

// startLoad starts readers that read each role through each node ten times a second, and
// writers of configs and roles.
func (w *clusterWorld) startLoad() {
	w.Helper()
	w.stop = make(chan struct{})
	w.readers, w.writers = nil, nil
	for _, node := range w.cluster.Nodes {
		for _, role := range append(slices.Sorted(maps.Keys(longRoles)), "short") {
			r := &reader{node: node, role: role, client: w.clients[node]}
			w.readers = append(w.readers, r)
			w.work.Go(func() { w.runReader(r) })
		}
	}
	for i, kind := range []string{"roles", "config", "roles"} {
		writer := &writer{kind: kind, name: fmt.Sprintf("%s-%d", w.name, i), half: &w.half, rand: rand.New(rand.NewPCG(w.seed, uint64(i))), keys: make(map[string]*key)}
		for _, node := range w.cluster.Nodes {
			writer.clients = append(writer.clients, w.clients[node])
		}
		w.writers = append(w.writers, writer)
		if i < 2 {
			w.work.Go(func() { w.runWriter(writer) })
		} else {
			w.filler = writer
		}
	}
	w.work.Go(w.runChurn)
	// Before the cluster shuts down.
	w.Cleanup(w.rest)
	w.awaitReads("the load has begun", w.cluster, time.Now())
}

// rest stops the load.
func (w *clusterWorld) rest() {
	select {
	case <-w.stop:
	default:
		close(w.stop)
	}
	w.work.Wait()
}

// reader reads a role through one node, and keeps its latest token.
type reader struct {
	node   *harness.Vault
	role   string
	client *api.Client

	mu        sync.Mutex
	attempts  []attempt // since the last call of forget
	token     string
	expiresAt time.Time
}

type attempt struct {
	began, ended time.Time
	err          error
}

func (w *clusterWorld) runReader(r *reader) {
	ticker := time.NewTicker(time.Second / 10)
	defer ticker.Stop()
	for n := 0; ; n++ {
		select {
		case <-w.stop:
			return
		case <-ticker.C:
		}
		w.reading.RLock()
		a := attempt{began: time.Now()}
		secret, err := r.client.Logical().Read("mojoauth/creds/" + r.role)
		a.ended = time.Now()
		w.reading.RUnlock()
		var token string
		var expiresAt time.Time
		switch {
		case err != nil:
		case secret == nil: // the node is just losing its mounts
			err = errors.New("status 404")
		default:
			token, _ = secret.Data["access_token"].(string)
			expires, _ := secret.Data["expires_at"].(string)
			if expiresAt, err = time.Parse(time.RFC3339, expires); err == nil && token == "" {
				err = errors.New("no token in the response")
			}
		}
		a.err = err

		r.mu.Lock()
		r.attempts = append(r.attempts, a)
		if err == nil {
			r.token, r.expiresAt = token, expiresAt
		}
		token, expiresAt = r.token, r.expiresAt
		r.mu.Unlock()
		if token == "" {
			continue
		}
		if now := time.Now(); !now.Before(expiresAt) {
			w.Errorf("%s through %s: has a token that expired %s ago", r.role, r.node.Address(), now.Sub(expiresAt))
		}
		if n%10 == 0 && r.role != "long-write" { // the API does not accept its scope
			if status, err := callAPI(w.oauth, token); err != nil || status != http.StatusOK {
				w.Errorf("%s through %s: the API returned %d, %v", r.role, r.node.Address(), status, err)
			}
		}
	}
}

// runChurn reads tokens of roles that are created and deleted all the time, to make the
// cache change too.
func (w *clusterWorld) runChurn() {
	ticker := time.NewTicker(time.Second / 5)
	defer ticker.Stop()
	for n := 0; ; n++ {
		select {
		case <-w.stop:
			return
		case <-ticker.C:
		}
		client := w.writers[0].clients[n%len(w.cluster.Nodes)]
		w.reading.RLock()
		_, _ = client.Logical().Read(fmt.Sprintf("mojoauth/creds/%s-%d", w.writers[0].name, n%writtenKeys)) // it may not exist
		w.reading.RUnlock()
	}
}

// forget clears the readers' recorded attempts.
func (w *clusterWorld) forget() {
	for _, r := range w.readers {
		r.mu.Lock()
		r.attempts = nil
		r.mu.Unlock()
	}
}

// since returns the attempts since the last call of forget.
func (r *reader) since() []attempt {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.attempts)
}

// awaitReads waits until each reader of the given nodes has read a token after the given
// time. It returns when the last one did.
func (w *clusterWorld) awaitReads(what string, through *harness.Cluster, after time.Time) (all time.Time) {
	w.Helper()
	harness.Eventually(w, what+": all readers read", func() error {
		all = after
		for _, r := range w.readers {
			if !slices.Contains(through.Nodes, r.node) {
				continue
			}
			attempts := r.since()
			good := slices.IndexFunc(attempts, func(a attempt) bool { return a.err == nil && a.began.After(after) })
			if good < 0 {
				err := errors.New("no attempt yet")
				if len(attempts) > 0 {
					err = attempts[len(attempts)-1].err
				}
				return fmt.Errorf("%s through %s: %w", r.role, r.node.Address(), err)
			}
			if ended := attempts[good].ended; ended.After(all) {
				all = ended
			}
		}
		return nil
	})
	return all
}

// writtenKeys is the number of configs or roles of a writer. It writes half of them at a
// time: what was written before and during a fault must not change before it is checked.
const writtenKeys = 8

// writer writes configs or roles, and records the outcome of each write.
type writer struct {
	kind    string // config or roles
	name    string // of what it writes, without the number
	half    *atomic.Int64
	rand    *rand.Rand
	clients []*api.Client
	count   int

	keys map[string]*key // by path
}

// key records what may be stored at a path: the last acknowledged value, or a later one
// that was neither acknowledged nor clearly refused.
type key struct {
	acknowledged string // "" if there is nothing
	uncertain    []string
	history      []string // the last writes, to find a lost one
}

func (w *clusterWorld) runWriter(wr *writer) {
	ticker := time.NewTicker(time.Second / 10)
	defer ticker.Stop()
	for {
		select {
		case <-w.stop:
			return
		case <-ticker.C:
		}
		w.writing.RLock()
		wr.write()
		w.writing.RUnlock()
	}
}

// write writes a new value through any node, or deletes the path.
func (wr *writer) write() {
	path, value := wr.next()
	client := wr.clients[wr.rand.IntN(len(wr.clients))]
	switch {
	case wr.rand.IntN(10) == 0:
		_ = wr.send(client, path, "", nil)
	case wr.kind == "roles":
		_ = wr.send(client, path, value, role(map[string]any{"config": "short", "max_ttl": value}))
	default:
		_ = wr.send(client, path, value, map[string]any{
			"client_id": value, "token_url": "https://unused.mojoauth.test/", "client_secret": canary, "verify_connection": false,
		})
	}
}

// send writes data, or deletes the path if data is nil, and records the outcome. It does
// not use the client's Logical, which takes two redirects in a row for a success, as
// happens while the nodes disagree.
func (wr *writer) send(client *api.Client, path, value string, data map[string]any) error {
	began := time.Now()
	request := client.NewRequest(http.MethodDelete, "/v1/mojoauth/"+path)
	if data != nil {
		request.Method = http.MethodPut
		if err := request.SetJSONBody(data); err != nil {
			return err
		}
	}
	resp, err := client.RawRequest(request) //nolint:staticcheck // nothing else returns the status
	if resp != nil {
		resp.Body.Close()
	}
	if err == nil && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent {
		err = fmt.Errorf("status %d", resp.StatusCode)
	}
	wr.note(path, value, client, began, err)
	return err
}

// next returns what to write next and where: a value that was not used before.
func (wr *writer) next() (path, value string) {
	wr.count++
	n := wr.rand.IntN(writtenKeys/2) + int(wr.half.Load())*writtenKeys/2
	return fmt.Sprintf("%s/%s-%d", wr.kind, wr.name, n), fmt.Sprint(1000 + wr.count)
}

// writeLarge writes a role of a few hundred kilobytes.
func (wr *writer) writeLarge() error {
	path, value := wr.next()
	return wr.send(wr.clients[0], path, value, map[string]any{
		"config": "short", "max_ttl": value, "extra_params": map[string]string{"pad": strings.Repeat("x", 400<<10)},
	})
}

// note records the outcome of a write.
func (wr *writer) note(path, value string, through *api.Client, began time.Time, err error) {
	k := wr.keys[path]
	if k == nil {
		k = &key{}
		wr.keys[path] = k
	}
	const clock = "15:04:05.000"
	k.history = append(k.history[max(0, len(k.history)-9):], fmt.Sprintf("%q through %s from %s to %s: %v",
		value, through.Address(), began.Format(clock), time.Now().Format(clock), err))
	if err != nil {
		k.uncertain = append(k.uncertain, value)
		return
	}
	k.acknowledged, k.uncertain = value, nil
}

// verify compares what each node has stored with what was acknowledged, and mints with a
// stored secret.
func (w *clusterWorld) verify(after string) {
	w.Helper()
	w.writing.Lock()
	defer w.writing.Unlock()
	active, settled := w.cluster.Active(w), time.Now().Add(harness.StandbyLag)
	for _, node := range w.cluster.Nodes {
		for path, want := range w.static {
			got := w.read(node, path)
			maps.DeleteFunc(got, func(field string, _ any) bool { _, known := want[field]; return !known }) // a newer version's fields
			if !reflect.DeepEqual(got, want) {
				w.Errorf("after %s, %s through %s: got %v, want %v", after, path, node.Address(), got, want)
			}
		}
		for _, wr := range w.writers {
			field := map[string]string{"roles": "max_ttl", "config": "client_id"}[wr.kind]
			for path, k := range wr.keys {
				var got string
				lost := func() bool {
					got = ""
					if data := w.read(node, path); data != nil {
						got = fmt.Sprint(data[field])
					}
					return got != k.acknowledged && !slices.Contains(k.uncertain, got)
				}
				for lost() && node != active && node.Product.Has(harness.StandbysRead) && time.Now().Before(settled) {
					time.Sleep(20 * time.Millisecond)
				}
				if lost() {
					w.Errorf("after %s, %s through %s: got %q, want the acknowledged %q or one of %q:\n%s", after, path, node.Address(), got, k.acknowledged, k.uncertain, strings.Join(k.history, "\n"))
				}
			}
		}
	}
	w.write("rotate-role/rotated", nil)
}

// mints counts the token requests for each role with one-hour tokens.
func (w *clusterWorld) mints() map[string]int {
	w.Helper()
	counts := make(map[string]int)
	for _, request := range w.oauth.Requests() {
		form, err := url.ParseQuery(request.Body)
		if err != nil {
			w.Fatal(err)
		}
		for name, scopes := range longRoles {
			if form.Get("client_id") == "long" && form.Get("scope") == scopes {
				counts[name]++
			}
		}
	}
	return counts
}

// at returns a path of the engine.
func (w *clusterWorld) at(path string) string { return cmp.Or(w.mount, "mojoauth") + "/" + path }

// strike records when a fault happened.
type strike struct{ began, ended time.Time }

// renewals checks that the role "short" was minted once per renewal interval since the
// given time, except for mints whose token a fault kept from being stored.
func (w *clusterWorld) renewals(since time.Time) {
	w.Helper()
	// A token is due with min_ttl left, and renewed up to a twentieth of its lifetime
	// earlier.
	const life = shortLifetime - shortMinTTL - shortLifetime/20
	var last time.Time
	mints, again := 0, 0
	for _, request := range grantsFor(w.oauth, "short") {
		if request.At.Before(since) {
			continue
		}
		mints++
		if sooner := request.At.Sub(last); !last.IsZero() && sooner < life-time.Second {
			again++
			cutOff := slices.ContainsFunc(w.strikes, func(s strike) bool {
				return last.After(s.began.Add(-2*time.Second)) && last.Before(s.ended)
			})
			if !cutOff {
				w.Errorf("short was minted at %s and again %.1f s later, although no fault interrupted the first mint", last.Format(time.TimeOnly), sooner.Seconds())
			}
		}
		last = request.At
	}
	w.Logf("short: %d mints in %.0f s for all nodes, %d of them after a fault had interrupted the one before", mints, time.Since(since).Seconds(), again)
}

// write writes through the active node, once there is one.
func (w *clusterWorld) write(path string, data map[string]any) {
	w.Helper()
	harness.Eventually(w, "writing "+path, func() error {
		_, err := w.cluster.Active(w).Logical().Write(w.at(path), data)
		return err
	})
}

// read returns the data at a path, or nil if there is none.
func (w *clusterWorld) read(node *harness.Vault, path string) map[string]any {
	w.Helper()
	var secret *api.Secret
	harness.Eventually(w, "reading "+path+" through "+node.Address(), func() (err error) {
		secret, err = w.clients[node].Logical().Read(w.at(path))
		return err
	})
	if secret == nil {
		return nil
	}
	return secret.Data
}

// noCanary searches the logs of the nodes and their plugins for the client secret.
func (w *clusterWorld) noCanary() {
	w.Helper()
	plugins := 0 // a node that was never active runs none
	for _, node := range w.cluster.Nodes {
		log := node.Log(w)
		plugins += strings.Count(log, pluginBinary)
		if strings.Contains(log, canary) {
			w.Errorf("the client secret is in the log of %s", node.Address())
		}
		for _, token := range w.oauth.Issued() {
			if strings.Contains(log, token) {
				w.Errorf("an access token is in the log of %s", node.Address())
			}
		}
	}
	if plugins == 0 {
		w.Error("no log has a line of the plugin")
	}
}
