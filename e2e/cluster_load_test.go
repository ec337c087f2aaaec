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

// Tokens of the role "short" live 90 s, and are due when 60 s are left: who reads
// often holds one that outlives any fault here. Those of the other roles live an hour,
// so that none is requested again, whatever happens.
const (
	shortLifetime = 90 * time.Second
	shortMinTTL   = 60 * time.Second
)

// longRoles are the roles whose tokens live an hour, with their scopes.
var longRoles = map[string]string{"long-read": "read:data", "long-write": "write:data", "long-both": "read:data write:data"}

// clusterWorld is a cluster whose readers and writers never rest.
type clusterWorld struct {
	testing.TB
	name    string // begins the names of what is written
	cluster *harness.Cluster
	mount   string // where the engine is; mojoauth if it is ""
	oauth   *oauthserver.Server
	seed    uint64
	clients map[*harness.Vault]*api.Client // whose responses are not kept

	binary string                    // of the plugin that runs
	static map[string]map[string]any // what is at the paths that nobody writes

	reading sync.RWMutex // read-held by each read of a token
	readers []*reader

	writing sync.RWMutex // read-held by each write
	writers []*writer
	strikes []strike     // so far
	half    atomic.Int64 // 0 or 1: the half of the paths that is written
	filler  *writer      // of large roles, when it is told to

	stop chan struct{}
	work sync.WaitGroup
}

// newClusterWorld makes a cluster of three with the engine, of that binary and
// version, at mojoauth/, and puts it under load.
func newClusterWorld(t testing.TB, binary, version string, seed uint64) *clusterWorld {
	t.Helper()
	w := &clusterWorld{TB: t, name: "written", cluster: harness.StartCluster(t, vaultBinary, pluginDir, 3), seed: seed, binary: binary}
	short := demoClient("short", canary)
	short.Lifetime = shortLifetime + time.Second // it rounds down
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
	w.write("roles/rotated", role(map[string]any{"config": "short"})) // that nobody reads
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

// connect makes the clients.
func (w *clusterWorld) connect() {
	w.Helper()
	w.clients = make(map[*harness.Vault]*api.Client)
	for _, node := range w.cluster.Nodes {
		w.clients[node] = node.Reader(w, 20*time.Second)
	}
}

// startLoad lets readers read all roles through all nodes, ten times a second each,
// and writers write configs and roles.
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
	// Before the cluster is taken down.
	w.Cleanup(w.rest)
	w.awaitReads("the load has begun", w.cluster, time.Now())
}

// rest ends the load.
func (w *clusterWorld) rest() {
	select {
	case <-w.stop:
	default:
		close(w.stop)
	}
	w.work.Wait()
}

// reader reads a role through one node, and holds the token it got last.
type reader struct {
	node   *harness.Vault
	role   string
	client *api.Client

	mu        sync.Mutex
	attempts  []attempt // since they were last forgotten
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
		case secret == nil: // a node that is just losing its mounts
			err = errors.New("status 404")
		default:
			token, _ = secret.Data["access_token"].(string)
			expires, _ := secret.Data["expires_at"].(string)
			if expiresAt, err = time.Parse(time.RFC3339, expires); err == nil && token == "" {
				err = errors.New("an answer without a token")
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
			w.Errorf("%s through %s: holds a token that expired %s ago", r.role, r.node.Address(), now.Sub(expiresAt))
		}
		if n%10 == 0 && r.role != "long-write" { // whose scope the API does not take
			if status, err := callAPI(w.oauth, token); err != nil || status != http.StatusOK {
				w.Errorf("%s through %s: the API answered %d, %v", r.role, r.node.Address(), status, err)
			}
		}
	}
}

// runChurn reads tokens of roles that come and go, so that the cache does too.
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

// forget makes the readers forget what became of their attempts.
func (w *clusterWorld) forget() {
	for _, r := range w.readers {
		r.mu.Lock()
		r.attempts = nil
		r.mu.Unlock()
	}
}

// since returns the attempts since they were last forgotten.
func (r *reader) since() []attempt {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.attempts)
}

// awaitReads waits until each reader of those nodes has read a token after that moment.
// It returns when the last one had.
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
				err := errors.New("it has not tried")
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

// writtenKeys is how many configs or roles a writer has. Half of them are written at a
// time: what was written before and while something happened must not be written again
// before it is looked at.
const writtenKeys = 8

// writer writes configs or roles, and knows what it was told of each.
type writer struct {
	kind    string // config or roles
	name    string // of what it writes, without the number
	half    *atomic.Int64
	rand    *rand.Rand
	clients []*api.Client
	count   int

	keys map[string]*key // by path
}

// key is what may be stored at a path: the value that was acknowledged last, or one
// that was written after it and neither acknowledged nor seen to be refused.
type key struct {
	acknowledged string // "" when there is nothing
	uncertain    []string
	history      []string // of the last writes, for whoever looks for a lost one
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

// write writes a new value, or deletes one, through any node.
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

// send writes data, or deletes what is there when data is nil, and remembers what was
// answered. Not by the client's Logical: it takes a redirect for a success when it comes
// twice, as when the nodes do not agree.
func (wr *writer) send(client *api.Client, path, value string, data map[string]any) error {
	began := time.Now()
	request := client.NewRequest(http.MethodDelete, "/v1/mojoauth/"+path)
	if data != nil {
		request.Method = http.MethodPut
		if err := request.SetJSONBody(data); err != nil {
			return err
		}
	}
	resp, err := client.RawRequest(request) //nolint:staticcheck // nothing else tells the status
	if resp != nil {
		resp.Body.Close()
	}
	if err == nil && resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent {
		err = fmt.Errorf("status %d", resp.StatusCode)
	}
	wr.note(path, value, client, began, err)
	return err
}

// next is what is to be written next, and where: a value that was not there before.
func (wr *writer) next() (path, value string) {
	wr.count++
	n := wr.rand.IntN(writtenKeys/2) + int(wr.half.Load())*writtenKeys/2
	return fmt.Sprintf("%s/%s-%d", wr.kind, wr.name, n), fmt.Sprint(1000 + wr.count)
}

// writeLarge writes a role that takes a few hundred kilobytes.
func (wr *writer) writeLarge() error {
	path, value := wr.next()
	return wr.send(wr.clients[0], path, value, map[string]any{
		"config": "short", "max_ttl": value, "extra_params": map[string]string{"pad": strings.Repeat("x", 400<<10)},
	})
}

// note remembers what became of a write.
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

// verify compares what all nodes have stored with what was acknowledged, and
// mints with a secret that was stored.
func (w *clusterWorld) verify(after string) {
	w.Helper()
	w.writing.Lock()
	defer w.writing.Unlock()
	active, settled := w.cluster.Active(w), time.Now().Add(harness.StandbyLag)
	for _, node := range w.cluster.Nodes {
		for path, want := range w.static {
			got := w.read(node, path)
			maps.DeleteFunc(got, func(field string, _ any) bool { _, known := want[field]; return !known }) // of a newer version
			if !reflect.DeepEqual(got, want) {
				w.Errorf("after %s, %s through %s is %v, want %v", after, path, node.Address(), got, want)
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
					w.Errorf("after %s, %s through %s is %q, want %q, which was acknowledged, or one of %q:\n%s", after, path, node.Address(), got, k.acknowledged, k.uncertain, strings.Join(k.history, "\n"))
				}
			}
		}
	}
	w.write("rotate-role/rotated", nil)
}

// mints counts the requests to the OAuth server for each of the roles whose tokens
// live long.
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

// at is a path of the engine's.
func (w *clusterWorld) at(path string) string { return cmp.Or(w.mount, "mojoauth") + "/" + path }

// strike is when a fault happened.
type strike struct{ began, ended time.Time }

// renewals checks that the role "short" was minted once a life since that moment, but for
// mints that a fault cut off before their token was stored.
func (w *clusterWorld) renewals(since time.Time) {
	w.Helper()
	// It is due when min_ttl is left, and renewed up to a twentieth of its life earlier.
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
				w.Errorf("short was minted at %s and again %.1f s later, and no fault cut off the first one", last.Format(time.TimeOnly), sooner.Seconds())
			}
		}
		last = request.At
	}
	w.Logf("short: %d mints in %.0f s for all nodes, %d of them since a fault had cut off the one before", mints, time.Since(since).Seconds(), again)
}

// write writes through the active node, once there is one.
func (w *clusterWorld) write(path string, data map[string]any) {
	w.Helper()
	harness.Eventually(w, "writing "+path, func() error {
		_, err := w.cluster.Active(w).Logical().Write(w.at(path), data)
		return err
	})
}

// read answers the data at a path, nil when there is none.
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

// noCanary looks for the client secret in what the nodes and their plugins logged.
func (w *clusterWorld) noCanary() {
	w.Helper()
	plugins := 0 // a node that was never the active one runs none
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
		w.Error("no log says anything of the plugin")
	}
}
