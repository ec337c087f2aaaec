// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package e2e

import (
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/harness"
	"github.com/mojoauth/vault-plugin-secrets-mojoauth/e2e/oauthserver"
)

const (
	// grace is how soon reads must succeed again once the nodes agree on an active one.
	grace = 2 * time.Second

	// An older state of the project, for the upgrade and the rollback. There is no
	// release yet.
	olderCommit  = "bd33e2a"
	olderVersion = "v0.0.9"
)

// fault is something that goes wrong in a cluster under load.
type fault struct {
	name string
	// strike causes the fault. It returns the node that is out of service as a result, if
	// any, and a function that heals the fault.
	strike func(w *clusterWorld) (down *harness.Vault, heal func())
	// forgets is set if the plugin before or after the fault stores no tokens. Each role
	// that is read then causes one more token request.
	forgets bool
	// failover is set if another node becomes active.
	failover bool
	// retried is set if a reader that tries again after a second sees no failure.
	retried bool
	// unnoticed is set if no read fails at all.
	unnoticed bool
	// gentle is set if the active node's plugin keeps running.
	gentle bool
}

var faults = []fault{
	{name: "kill -9 of the active node", failover: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		active := w.cluster.Active(w)
		active.Kill(w)
		return active, func() { w.cluster.Restart(w, active) }
	}},
	{name: "kill -9 of a standby", gentle: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		standby := w.standby()
		standby.Kill(w)
		return standby, func() { w.cluster.Restart(w, standby) }
	}},
	{name: "step-down", failover: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		w.cluster.StepDown(w)
		return nil, nil
	}},
	{name: "seal and unseal", failover: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		active := w.cluster.Active(w)
		if err := active.Sys().Seal(); err != nil {
			w.Error(err)
		}
		return active, func() { active.Unseal(w) }
	}},
	{name: "kill -9 of the plugin with reads in flight", retried: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		w.signalPlugin(syscall.SIGSTOP)
		time.Sleep(time.Second / 2) // until all readers wait for it
		w.signalPlugin(syscall.SIGKILL)
		return nil, nil
	}},
	{name: "SIGSTOP of the plugin for 5 s", gentle: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		w.signalPlugin(syscall.SIGSTOP)
		time.Sleep(5 * time.Second)
		w.signalPlugin(syscall.SIGCONT)
		return nil, nil
	}},
	{name: "plugin reload", retried: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		if _, err := w.cluster.Active(w).Logical().Write("sys/plugins/reload/backend", map[string]any{"mounts": "mojoauth/"}); err != nil {
			w.Error(err)
		}
		return nil, nil
	}},
	{name: "OAuth server down for 10 s", gentle: true, unnoticed: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		w.oauth.SetFaults(oauthserver.Faults{Drop: "before"})
		time.Sleep(10 * time.Second)
		w.oauth.SetFaults(oauthserver.Faults{})
		return nil, nil
	}},
}

// diskFull fills the active node's disk while configs and roles are written. The node
// loses leadership, may win it back while a little still fits, and may even crash. So the
// fault includes freeing the space and restarting the node if it has crashed.
var diskFull = fault{name: "disk of the active node full for 3 s", strike: func(w *clusterWorld) (*harness.Vault, func()) {
	active := w.cluster.Active(w)
	free := active.FillDisk(w)
	var refused error
	for n := 0; n < 200 && refused == nil; n++ {
		refused = w.filler.writeLarge()
	}
	if refused == nil {
		w.Error("no write failed: the disk was not full")
	}
	time.Sleep(3 * time.Second)
	free()
	if !active.Running() {
		w.cluster.Restart(w, active)
	}
	return nil, nil
}}

func (w *clusterWorld) standby() *harness.Vault {
	w.Helper()
	active := w.cluster.Active(w)
	return w.cluster.Nodes[slices.IndexFunc(w.cluster.Nodes, func(node *harness.Vault) bool { return node != active })]
}

func (w *clusterWorld) signalPlugin(signal syscall.Signal) {
	w.Helper()
	w.cluster.Active(w).SignalPlugin(w, w.binary, signal)
}

// plugin returns the engine's processes on the active node.
func (w *clusterWorld) plugin() []int {
	w.Helper()
	pids := w.cluster.Active(w).PluginProcesses(w, w.binary)
	if len(pids) == 0 {
		w.Fatalf("there is no process of %s", w.binary)
	}
	return pids
}

// changeTo upgrades the mount to another version of the plugin, or rolls it back.
func changeTo(binary, version string) fault {
	return fault{name: "change to version " + version, retried: true, strike: func(w *clusterWorld) (*harness.Vault, func()) {
		root, err := harness.Root()
		if err != nil {
			w.Fatal(err)
		}
		active := w.cluster.Active(w)
		path := filepath.Join(pluginDir, binary)
		cmd := exec.Command(filepath.Join(root, "scripts", "register.sh"), sha256Of(w, path), path)
		cmd.Env = append(os.Environ(), active.Environment()...)
		if out, err := cmd.CombinedOutput(); err != nil {
			w.Fatalf("register.sh: %v\n%s", err, out)
		}
		w.binary = binary
		for _, node := range w.cluster.Nodes { // standbys reload later
			harness.Eventually(w, node.Address()+" runs version "+version, func() error {
				mount, err := node.Logical().Read("sys/mounts/mojoauth")
				if err == nil && (mount == nil || mount.Data["running_plugin_version"] != version) {
					err = fmt.Errorf("got the mount %v", mount)
				}
				return err
			})
		}
		return nil, nil
	}}
}

// recovery is how long a fault had an effect, from its beginning.
type recovery struct {
	agreed time.Duration // until all nodes knew an active one
	reads  time.Duration // until the response to the last failed read
	failed int           // reads
}

func (r recovery) String() string {
	failed := "no read failed"
	if r.failed > 0 {
		failed = fmt.Sprintf("%d reads failed, the last %.2f s after the fault began", r.failed, r.reads.Seconds())
	}
	return fmt.Sprintf("%s; the nodes agreed on an active one after %.2f s", failed, r.agreed.Seconds())
}

// suffer causes a fault and verifies that nothing is lost.
func (w *clusterWorld) suffer(f fault) {
	w.Helper()
	before, was, activations := w.mints(), w.cluster.Active(w), w.cluster.Activations(w)
	w.forget()
	began := time.Now()
	down, heal := f.strike(w)
	defer func() { w.strikes = append(w.strikes, strike{began, time.Now()}) }()
	others := w.cluster.Without(down)
	harness.Eventually(w, f.name+": the nodes agree", func() error {
		active, err := others.Agreed()
		if err == nil && f.failover && active == was {
			err = errors.New("the active node has not changed")
		}
		return err
	})
	agreed := time.Now()
	w.half.Store(1 - w.half.Load()) // keeps what was written so far for verify
	if back := w.awaitReads(f.name, others, agreed); back.After(agreed.Add(grace)) {
		w.Errorf("%s: a reader waited %s after the nodes agreed", f.name, back.Sub(agreed))
	}
	time.Sleep(time.Until(agreed.Add(grace + time.Second/2))) // for late failures
	felt := w.examine(f, others, began, agreed)

	if heal != nil {
		heal()
		harness.Eventually(w, f.name+": the nodes agree after healing", func() error { _, err := w.cluster.Agreed(); return err })
		w.awaitReads(f.name+", healed", w.cluster, time.Now())
	}
	most := 0
	if f.forgets { // once for each cache that began empty
		most = w.cluster.Activations(w) - activations + 1
		if was.Product.Has(harness.StandbysRead) {
			most += len(w.cluster.Nodes) - 1
		}
	}
	asked := 0
	for name, n := range w.mints() {
		n -= before[name]
		asked += n
		if n > most {
			w.Errorf("%s: got %d requests for role %s, want at most %d", f.name, n, name, most)
		}
	}
	w.verify(f.name)
	felt.agreed = agreed.Sub(began)
	w.Logf("%s  %s: %s; %d requests for %d roles", began.Format(time.TimeOnly), f.name, felt, asked, len(longRoles))
}

// examine evaluates the reads through the given nodes.
func (w *clusterWorld) examine(f fault, through *harness.Cluster, began, agreed time.Time) (felt recovery) {
	w.Helper()
	for _, reader := range w.readers {
		if !slices.Contains(through.Nodes, reader.node) {
			continue
		}
		var first time.Time // the first failed read of a series
		for _, a := range reader.since() {
			if a.err == nil {
				first = time.Time{}
				continue
			}
			if first.IsZero() {
				first = a.ended
			}
			felt.failed++
			felt.reads = max(felt.reads, a.ended.Sub(began))
			if late := a.began.After(agreed.Add(grace)); late || f.unnoticed || f.retried && a.began.Sub(first) > time.Second {
				w.Errorf("%s: reading %s through %s %s after the fault began: %v", f.name, reader.role, reader.node.Address(), a.began.Sub(began), a.err)
			}
		}
	}
	return felt
}

// chooseSeed returns CLUSTER_SEED, to repeat a run, or a new seed.
func chooseSeed(t testing.TB) uint64 {
	seed, err := strconv.ParseUint(os.Getenv("CLUSTER_SEED"), 10, 64)
	if err != nil {
		seed = rand.Uint64()
	}
	t.Logf("CLUSTER_SEED=%d repeats the order of faults", seed)
	return seed
}

// Whatever happens to a cluster of three, no acknowledged write is lost, no reader is
// left with an expired token, and reads soon succeed again.
//
// The test does not run in parallel with others: nodes that get no CPU time hold
// elections on their own.
func TestCluster(t *testing.T) {
	const randomFor = 20 * time.Second
	older, err := harness.BuildPluginOf(t, olderCommit, pluginDir, strings.TrimPrefix(olderVersion, "v"))
	if errors.Is(err, harness.ErrNoHistory) {
		harness.Missing(t, "an upgrade needs the project's history: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	w := newClusterWorld(t, older, olderVersion, chooseSeed(t))
	for i, f := range []fault{changeTo(pluginBinary, pluginVersion), changeTo(older, olderVersion), changeTo(pluginBinary, pluginVersion)} {
		f.forgets = i < 2 // the last one finds what the first one stored
		w.suffer(f)
	}
	upgraded := time.Now()

	all := w.allFaults()
	for _, f := range all {
		w.suffer(f)
	}
	random := rand.New(rand.NewPCG(w.seed, 99))
	for until := time.Now().Add(randomFor); time.Now().Before(until) && !t.Failed(); {
		w.suffer(all[random.IntN(len(all))])
	}
	w.rest()
	w.renewals(upgraded)
	w.restoreElsewhere()
	w.noCanary()
}

// allFaults adds the faults that not every machine allows.
func (w *clusterWorld) allFaults() []fault {
	w.Helper()
	switch {
	case w.cluster.HasDisks(w):
		return append(slices.Clone(faults), diskFull)
	case os.Getenv("CI") != "":
		w.Error("this process may not mount a disk, so it cannot fill one")
	default:
		harness.NotTested(w, "a full disk, because this process may not mount one")
	}
	return faults
}

// restoreElsewhere takes a snapshot and restores it in a new cluster.
func (w *clusterWorld) restoreElsewhere() {
	w.Helper()
	snapshot := w.cluster.Snapshot(w)
	other := harness.StartCluster(w, vaultBinary, pluginDir, 3)
	other.Restore(w, snapshot, w.cluster)
	restored := &clusterWorld{TB: w, name: "restored", cluster: other, oauth: w.oauth, seed: w.seed, binary: w.binary, static: w.static, writers: w.writers}
	restored.connect()
	restored.verify("restoring a snapshot")
	before := w.mints()
	restored.startLoad()
	restored.suffer(faults[0])
	restored.rest()
	if after := w.mints(); !maps.Equal(after, before) {
		w.Errorf("the snapshot's tokens were requested again: %v requests before, %v after", before, after)
	}
}
