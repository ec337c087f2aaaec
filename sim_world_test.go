// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
	"weak"

	"github.com/hashicorp/vault/sdk/helper/consts"
	"github.com/hashicorp/vault/sdk/helper/errutil"
	"github.com/hashicorp/vault/sdk/logical"
)

// This file is the world of a simulation: the nodes, the requests to them, and the dice.

// simSecretShown is how much of a client secret a trace shows.
const simSecretShown = 6

// simWorld is one case. It runs on the time of its synctest bubble.
type simWorld struct {
	t     *testing.T
	seed  uint64
	rng   *rand.Rand // for the one goroutine that decides what happens next
	fate  *rand.Rand // for the same goroutine: deaths and their consequences
	start time.Time
	// stores is set when one node is active and the other is a standby, as in a cluster.
	// Then they store tokens. Otherwise both nodes write and store none.
	stores bool

	log struct {
		sync.Mutex
		events     []simEvent
		violations []string
	}
	running sync.WaitGroup // everything under way

	mu             sync.Mutex // guards everything below; never held across a wait
	shared         *logical.InmemStorage
	storageWeather simStorageWeather
	storageOps     int
	history        map[string]*simHistory
	stored         map[string][]*simStored
	snapshot       *simSnapshot
	tally          simTally
	period         time.Duration // of a node's periodic work
	endpoint       *simEndpoint
	nodes          []*simNode // the latest process of each
	requests       int
	ops            int
	busy           struct { // to detect an engine that loops
		at    time.Duration
		count int
		told  bool
	}
	// calm is since when the world has been free of faults long enough that the engine
	// must work without failures; -1 while it need not.
	calm time.Duration
}

// simEvent is a line of a trace. It is formatted only when the trace is printed.
type simEvent struct {
	at     time.Duration
	format string
	args   []any
}

func (e simEvent) String() string {
	return fmt.Sprintf("%14s  ", e.at) + fmt.Sprintf(e.format, e.args...)
}

func newSimWorld(t *testing.T, seed uint64) *simWorld {
	w := &simWorld{
		t: t, seed: seed, rng: rand.New(rand.NewPCG(seed, 1)), fate: rand.New(rand.NewPCG(seed, 2)), start: time.Now(),
		shared:  &logical.InmemStorage{},
		history: make(map[string]*simHistory),
		stored:  make(map[string][]*simStored),
		endpoint: &simEndpoint{
			weather: simWeathers[0], lives: simLifes[0],
			secrets: make(map[string]string), tokens: make(map[string]*simToken), newest: make(map[string]*simToken),
		},
		nodes:  make([]*simNode, 2),
		period: time.Minute,
		calm:   -1,
	}
	return w
}

// now returns how long the simulation has lasted, in virtual time.
func (w *simWorld) now() time.Duration { return time.Since(w.start) }

// at returns the clock time at that moment.
func (w *simWorld) at(d time.Duration) time.Time { return w.start.Add(d) }

// note adds a line to the trace. The arguments must not change afterwards.
func (w *simWorld) note(format string, args ...any) {
	for i, arg := range args {
		if s, ok := arg.(fmt.Stringer); ok {
			if _, fine := arg.(time.Duration); !fine {
				args[i] = s.String()
			}
		}
	}
	w.log.Lock()
	defer w.log.Unlock()
	w.log.events = append(w.log.events, simEvent{w.now(), format, args})
}

// violate notes that a rule was broken.
func (w *simWorld) violate(format string, args ...any) {
	w.note("VIOLATION: "+format, args...)
	w.log.Lock()
	defer w.log.Unlock()
	last := w.log.events[len(w.log.events)-1]
	w.log.violations = append(w.log.violations, strings.TrimSpace(last.String()))
}

// dice returns dice that depend on what happens and when, not on earlier throws. So it
// does not matter which of two simultaneous events comes first.
func (w *simWorld) dice(parts ...string) *rand.Rand {
	h := fnv.New64a()
	for _, part := range parts {
		_, _ = h.Write([]byte(part))
		_, _ = h.Write([]byte{0})
	}
	return rand.New(rand.NewPCG(w.seed^h.Sum64(), uint64(w.now())))
}

// random is the engine's source of jitter.
func (w *simWorld) random() float64 { return w.dice("jitter").Float64() }

// count detects an engine that loops while no time passes. The caller holds w.mu.
func (w *simWorld) count() {
	if now := w.now(); w.busy.at != now {
		w.busy.at, w.busy.count = now, 0
	}
	if w.busy.count++; w.busy.count > 3000 && !w.busy.told {
		w.busy.told = true
		w.violate("3000 storage operations and mints happen at one moment")
	}
}

// simNode is the mount in one process of one of the nodes.
type simNode struct {
	w        *simWorld
	name     string
	place    int
	readOnly bool
	mount    *testMount

	startedAt time.Duration
	closingAt time.Duration // -1 before
	// A node that is cut off reaches nothing any more. It has died, or its process has
	// ended after closing.
	cut, died bool
	fuse      simFuse
	life      context.Context // of its requests
	kill      context.CancelFunc
	stopped   chan struct{} // closed when it closes or dies

	found     map[string]int // the versions that storage held when the node started
	known     map[string][]simKnown
	seen      map[string]int      // the newest version of each entry that it got from storage
	busy      map[*simOp]struct{} // requests under way
	exclusive bool                // a write under way may hold a lock for a while

	storageFailed time.Duration // when storage failed last; -1 before
	unsettled     time.Duration // until when the node may still be reloading an invalidated entry; -1 before
	inMemory      map[string]bool
	blurredAt     time.Duration // when something was last written or invalidated
	minted        []weak.Pointer[token]

	judge simJudge
}

// open starts a mount on the node at that place.
func (w *simWorld) open(place, number int, readOnly bool) {
	n := &simNode{
		w: w, name: fmt.Sprintf("%c%d", 'A'+place, number), place: place, readOnly: readOnly,
		startedAt: -1, closingAt: -1, storageFailed: -1, unsettled: -1,
		found: make(map[string]int), known: make(map[string][]simKnown), seen: make(map[string]int), busy: make(map[*simOp]struct{}),
		inMemory: make(map[string]bool),
		judge:    newSimJudge(),
		stopped:  make(chan struct{}),
	}
	n.life, n.kill = context.WithCancel(context.Background())
	system := logical.TestSystemView()
	if readOnly {
		system.ReplicationStateVal = consts.ReplicationPerformanceStandby
	}
	storage := &countingStorage{Storage: &simStorage{Storage: w.shared, node: n}}
	n.mount = newTestNode(w.t, nil, n.newClient, storage, system)
	n.mount.random = w.random
	w.mu.Lock()
	n.startedAt = w.now()
	for key, h := range w.history {
		n.found[key] = h.last().number
	}
	w.nodes[place] = n
	w.note("%s starts", n.name)
	w.mu.Unlock()
	n.initialize()
}

// shut closes a mount.
func (n *simNode) shut() {
	w := n.w
	w.mu.Lock()
	if n.cut {
		w.mu.Unlock()
		return
	}
	n.closingAt = w.now()
	close(n.stopped)
	w.note("%s closes", n.name)
	w.mu.Unlock()
	n.mount.Cleanup(context.Background())
	w.mu.Lock()
	defer w.mu.Unlock()
	if took := w.now() - n.closingAt; took > simCloseWithin {
		w.violate("closing %s took %s", n.name, took)
	}
	w.note("%s has closed", n.name)
}

const (
	opRead   = "read"
	opWrite  = "write"
	opDelete = "delete"
	opRotate = "rotate"
	opStatus = "status"
)

// simOp is one request to a node.
type simOp struct {
	id     int
	kind   string
	node   *simNode
	path   string // what is asked for
	key    string // of the entry that a write changes, else ""
	data   map[string]any
	giveUp time.Duration // after which the client gives up; 0 for never
	slow   bool          // storage may be slow

	// a read or a rotation
	role   string
	scopes []string
	minTTL time.Duration

	// a write
	change func(f *simFields, created bool)

	start, end    time.Duration // end is -1 before it
	inMemory      bool          // role and config surely were in memory at the start
	longest       time.Duration // the longest request_timeout of the role's mints under way at the start
	forwarded     bool          // to the active node
	storageOps    int
	storageTime   time.Duration
	storageFailed bool
	gaveUp        bool
	wrote         *simVersion // the version that it made

	resp *logical.Response
	err  error
	done func(*simOp) // called at the end, if set
}

func (op *simOp) String() string {
	return fmt.Sprintf("%s #%d %s %s", op.node.name, op.id, op.kind, op.path)
}

// begin sends a request and does not wait for the answer.
func (n *simNode) begin(op *simOp) {
	w := n.w
	w.mu.Lock()
	w.ops++
	op.id, op.node, op.start, op.end = w.ops, n, w.now(), -1
	if n.cut {
		op.err, op.end = errSimDied, w.now()
		w.note("%s: the node is not running", op)
		w.mu.Unlock()
		if op.done != nil {
			op.done(op)
		}
		return
	}
	n.busy[op] = struct{}{}
	op.inMemory = n.inMemory[op.role]
	if op.kind == opRead && len(op.scopes) > 0 || n.judge.greedy[op.role] == 0 {
		n.judge.greedy[op.role]++
	}
	for m := range n.judge.flights {
		if m.role == op.role {
			op.longest = max(op.longest, m.entry.RequestTimeout)
		}
	}
	exclusive := op.kind != opRead && op.kind != opStatus && op.slow
	n.exclusive = n.exclusive || exclusive
	if op.kind == opRotate {
		n.judge.rotations = append(n.judge.rotations, op)
	}
	w.note("%s %s", op, simData(op.data))
	w.mu.Unlock()

	w.running.Go(func() {
		ctx := context.WithValue(n.life, simOpKey{}, op)
		cancel := func() {}
		if op.giveUp > 0 {
			ctx, cancel = context.WithTimeout(ctx, op.giveUp)
		}
		resp, err := n.send(ctx, op)
		op.gaveUp = ctx.Err() != nil
		cancel()
		w.mu.Lock()
		op.resp, op.err, op.end = resp, err, w.now()
		delete(n.busy, op)
		if exclusive {
			n.exclusive = false
		}
		if n.died {
			op.resp, op.err = nil, errSimDied
		}
		w.note("%s after %s: %s", op, op.end-op.start, simResult(op))
		if !n.died {
			w.ended(op)
		}
		w.mu.Unlock()
		if op.forwarded {
			n.forward(op)
		}
		if op.done != nil {
			op.done(op)
		}
	})
}

// send does what Vault does with a request.
func (n *simNode) send(ctx context.Context, op *simOp) (*logical.Response, error) {
	kind := map[string]logical.Operation{
		opRead: logical.ReadOperation, opStatus: logical.ReadOperation, opDelete: logical.DeleteOperation,
		opWrite: logical.UpdateOperation, opRotate: logical.UpdateOperation,
	}[op.kind]
	req := &logical.Request{Operation: kind, Path: op.path, Data: op.data, Storage: n.mount.storage}
	if op.kind == opWrite && !n.readOnly {
		found, exists, err := n.mount.HandleExistenceCheck(ctx, req)
		if user := (errutil.UserError{}); errors.As(err, &user) {
			return logical.ErrorResponse(user.Err), nil
		} else if err != nil {
			return nil, err
		} else if found && !exists {
			req.Operation = logical.CreateOperation
		}
	}
	return n.mount.HandleRequest(ctx, req)
}

// ended judges the result of a request and keeps account of it. The caller holds w.mu.
func (w *simWorld) ended(op *simOp) {
	n := op.node
	if op.gaveUp && op.storageOps > 0 {
		clear(n.inMemory) // the next reader compares with storage in this one's place
	}
	switch op.kind {
	case opRead:
		if op.err == logical.ErrReadOnly { //nolint:errorlint // Vault wants it bare
			w.judgeForward(op)
			return
		}
		w.judgeRead(op)
	case opRotate:
		w.judgeRotation(op)
	case opStatus:
		w.judgeStatus(op)
	case opWrite, opDelete:
		w.judgeWrite(op)
	}
	if op.key == "" {
		return
	}
	// The engine must know now what a write made, whether or not the write was reported
	// as successful: after a failure it must look in storage.
	if op.wrote != nil {
		w.learned(n, op.key, op.wrote.number, op.wrote.at)
	} else if op.err != nil {
		w.blurred(n, op.key)
	}
}

// written is called when storage holds a new version of an entry. The other nodes get an
// invalidation after a while.
func (w *simWorld) written(n *simNode, op *simOp, key string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if op == nil {
		w.violate("%s wrote %s, and no request asked for it", n.name, key)
		return
	}
	h := w.history[key]
	if h == nil {
		h = newSimHistory()
		w.history[key] = h
	}
	if op.key != key {
		w.violate("%s wrote %s", op, key)
		return
	}
	op.wrote = h.write(op, w.now())
	op.wrote.generation = w.generation(key)
	w.note("%s makes %s version %d", op, key, op.wrote.number)
	for _, node := range w.nodes {
		if node != nil {
			w.blurred(node, key)
		}
	}
	dice := w.dice("invalidate", key)
	delay := time.Duration(dice.Int64N(int64([]time.Duration{time.Millisecond, 100 * time.Millisecond, simLate}[dice.IntN(3)])))
	lost := w.calm < 0 && dice.Float64() < 0.05
	number := op.wrote.number
	w.tell(n, key, delay, lost, func(node *simNode) { w.learned(node, key, number, w.now()) })
}

// tell sends the other nodes an invalidation, unless it is lost. The caller holds w.mu.
func (w *simWorld) tell(n *simNode, key string, delay time.Duration, lost bool, told func(*simNode)) {
	for _, node := range w.nodes {
		if node == nil || node == n || lost {
			continue
		}
		w.running.Go(func() {
			time.Sleep(delay)
			w.mu.Lock()
			gone := node.closingAt >= 0
			w.mu.Unlock()
			if gone {
				return
			}
			node.mount.InvalidateKey(context.Background(), key)
			w.mu.Lock()
			defer w.mu.Unlock()
			w.note("%s: %s is invalidated", node.name, key)
			told(node)
		})
	}
}

// learned is called when a node must know a version of an entry. The node may have used it
// from since on.
func (w *simWorld) learned(n *simNode, key string, number int, since time.Duration) {
	n.learn(key, number)
	w.blurred(n, key)
	if name, ok := strings.CutPrefix(key, configPrefix); ok {
		n.judge.configWritten(name, since, w.now())
	}
}

// stored returns the number of the newest version that storage surely has of an entry.
func (n *simNode) stored(key string) int {
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	if h := n.w.history[key]; h != nil {
		return h.last().number
	}
	return 0
}

// sees is called when a node gets an entry from storage, in that version or a newer one.
// From now on the node may use it, but need not if no invalidation has reached it.
func (n *simNode) sees(key string, number int) {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	if number > max(n.seen[key], n.knows(key, w.now()+1)) {
		n.seen[key] = number
		w.blurred(n, key)
	}
}

// roleConfig returns the config that a role names, according to storage.
func (w *simWorld) roleConfig(role string) string {
	if h := w.history[rolePrefix+role]; h != nil {
		return h.last().config
	}
	return ""
}

// simData formats the fields of a request, sorted and without secrets.
func simData(data map[string]any) string {
	var parts []string
	for name, value := range data {
		text := fmt.Sprint(value)
		if name == "client_secret" {
			text = text[:simSecretShown]
		}
		parts = append(parts, name+"="+text)
	}
	slices.Sort(parts)
	return strings.Join(parts, " ")
}

// simResult summarizes the result of a request.
func simResult(op *simOp) string {
	switch {
	case op.err != nil:
		return "error: " + op.err.Error()
	case op.resp == nil:
		return "done"
	case op.resp.IsError():
		return "refused: " + op.resp.Error().Error()
	case op.kind == opRead:
		d := op.resp.Data
		return fmt.Sprintf("%v until %v, ttl %v, warnings %d", d["access_token"], d["expires_at"], d["ttl"], len(op.resp.Warnings))
	case op.kind == opRotate:
		return fmt.Sprintf("rotated at %v", op.resp.Data["last_vault_rotation"])
	default:
		return "done"
	}
}

// Names in a simulation say what they are for.

func simRoleName(i int) string                { return fmt.Sprintf("r%d", i) }
func simConfigName(i int) string              { return fmt.Sprintf("c%d", i) }
func simClientID(config string, n int) string { return fmt.Sprintf("%s-client-%d", config, n) }
func simURL(config string, n int) string {
	return fmt.Sprintf("https://%s-%d.auth.mojoauth.test/oauth2/token", config, n)
}
func simAudience(role string, n int) string   { return fmt.Sprintf("%s-api-%d", role, n) }
func simSecret(clientID string, n int) string { return fmt.Sprintf("s%05d-%s-canary", n, clientID) }
func simRoleOf(audience string) string        { role, _, _ := strings.Cut(audience, "-api-"); return role }
func simConfigOf(clientID string) string {
	config, _, _ := strings.Cut(clientID, "-client-")
	return config
}
