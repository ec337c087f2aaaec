// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// Cluster is a Vault or OpenBao cluster on integrated storage, with TLS between the nodes
// and for clients.
type Cluster struct {
	Nodes []*Vault
}

// diskSize is enough for what a node stores in the longest test, and small enough to
// fill.
const diskSize = 192 << 20

// StartCluster starts a cluster with empty storage. If this process may mount disks, each
// node's storage is on its own disk.
func StartCluster(t testing.TB, binary, pluginDir string, nodes int) *Cluster {
	t.Helper()
	return startCluster(t, binary, pluginDir, nodes, time.Second)
}

// NoticeDeath is how long the nodes of a patient cluster wait without an active node
// before they elect another.
const NoticeDeath = 5 * time.Second

// StartPatientCluster is StartCluster for tests that run in parallel with others and
// compete for CPU time.
func StartPatientCluster(t testing.TB, binary, pluginDir string, nodes int) *Cluster {
	t.Helper()
	return startCluster(t, binary, pluginDir, nodes, NoticeDeath)
}

func startCluster(t testing.TB, binary, pluginDir string, nodes int, patience time.Duration) *Cluster {
	t.Helper()
	ca := NewAuthority(t)
	c := &Cluster{}
	for range nodes {
		c.Nodes = append(c.Nodes, newVault(t, binary, t.TempDir(), FreeAddress(t), ca))
	}
	for i, node := range c.Nodes {
		var join strings.Builder
		for _, other := range c.Nodes {
			if other != node {
				fmt.Fprintf(&join, "  retry_join {\n    leader_api_addr = %q\n    leader_ca_cert_file = %q\n  }\n", other.address, other.caFile)
			}
		}
		if err := os.Mkdir(node.disk(), 0o700); err != nil {
			t.Fatal(err)
		}
		mountDisk(t, node.disk())
		node.configure(t, raftStanza(node.disk(), fmt.Sprintf("node-%d", i), join.String(), node.Product.multiplier(patience)), pluginDir, "info")
		node.Start(t)
	}
	t.Cleanup(func() {
		if t.Failed() {
			for i, node := range c.Nodes {
				t.Logf("end of the log of node %d, %s:\n%s", i, node.address, node.logTail(t))
			}
		}
	})

	first := c.Nodes[0]
	first.initialize(t)
	first.Unseal(t)
	// Otherwise a node has no vote for its first ten seconds.
	if _, err := first.Logical().Write("sys/storage/raft/autopilot/configuration", map[string]any{"server_stabilization_time": "1s"}); err != nil {
		t.Fatal(err)
	}
	for _, node := range c.Nodes[1:] {
		node.unsealKey = first.unsealKey
		node.SetToken(first.Token())
		node.Unseal(t)
	}
	Eventually(t, "all nodes vote", func() error {
		state, err := first.Sys().RaftAutopilotState()
		if err == nil && (!state.Healthy || len(state.Voters) != nodes) {
			err = fmt.Errorf("healthy %v, voters %v", state.Healthy, state.Voters)
		}
		return err
	})
	return c
}

// Without returns the cluster without a node.
func (c *Cluster) Without(node *Vault) *Cluster {
	return &Cluster{Nodes: slices.DeleteFunc(slices.Clone(c.Nodes), func(other *Vault) bool { return other == node })}
}

// Agreed returns the active node once it says so itself and all unsealed nodes know it.
// Until then, it returns an error.
func (c *Cluster) Agreed() (*Vault, error) {
	var active *Vault
	address := ""
	for _, node := range c.Nodes {
		if !node.Running() {
			continue
		}
		health, err := node.Sys().Health()
		if err != nil {
			return nil, err
		}
		if health.Sealed {
			continue
		}
		if !health.Standby {
			active = node
		}
		leader, err := node.Sys().Leader()
		if err != nil {
			return nil, err
		}
		if leader.LeaderAddress == "" || address != "" && leader.LeaderAddress != address {
			return nil, fmt.Errorf("%s considers %q the active node, another considers %q", node.address, leader.LeaderAddress, address)
		}
		address = leader.LeaderAddress
	}
	if active == nil || active.address != address {
		return nil, fmt.Errorf("the nodes consider %q active, but it is not", address)
	}
	return active, nil
}

// Active waits until the nodes agree on the active node.
func (c *Cluster) Active(t testing.TB) *Vault {
	t.Helper()
	var active *Vault
	Eventually(t, "the nodes agree", func() (err error) {
		active, err = c.Agreed()
		return err
	})
	return active
}

// Enable mounts a registered plugin at path, and waits until all nodes serve it.
func (c *Cluster) Enable(t testing.TB, path, plugin, version string) {
	t.Helper()
	c.Active(t).Enable(t, path, plugin, version)
	for _, node := range c.Nodes {
		Eventually(t, node.address+" serves the mount", func() error { // MountsArriveLater
			resp, err := node.Logical().ReadRawWithData(path+"/", map[string][]string{"help": {"1"}})
			if resp != nil {
				resp.Body.Close()
			}
			return err
		})
	}
}

// StepDown makes the active node step down, and waits until another one is active.
func (c *Cluster) StepDown(t testing.TB) {
	t.Helper()
	const patience = 5 * time.Second // an election takes less
	was := c.Active(t)
	var asked time.Time
	Eventually(t, "another node is active", func() error {
		if asked.IsZero() || was.Product.Has(StepDownIsIgnored) && time.Since(asked) > patience {
			if err := was.Sys().StepDown(); err != nil {
				return err
			}
			asked = time.Now()
		}
		active, err := c.Agreed()
		if err == nil && active == was {
			err = errors.New(was.address + " is still active")
		}
		return err
	})
}

// Activations returns how often a node of the cluster has started the plugin: as the
// active node, and in OpenBao also as a standby (StandbysRead).
func (c *Cluster) Activations(t testing.TB) int {
	t.Helper()
	n := 0
	for _, node := range c.Nodes {
		n += strings.Count(node.Log(t), "core: post-unseal setup complete")
	}
	return n
}

// Restart starts a node that has exited, and unseals it.
func (c *Cluster) Restart(t testing.TB, node *Vault) {
	t.Helper()
	node.Start(t)
	node.Unseal(t)
}

// Restore replaces everything stored in the cluster with a snapshot of another cluster.
// From then on, it has the other's keys and root token.
func (c *Cluster) Restore(t testing.TB, snapshot string, from *Cluster) {
	t.Helper()
	file, err := os.Open(snapshot)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	active := c.Active(t)
	if err := active.Sys().RaftSnapshotRestore(file, true); err != nil {
		t.Fatal(err)
	}
	for _, node := range c.Nodes {
		node.unsealKey = from.Nodes[0].unsealKey
		node.SetToken(from.Nodes[0].Token())
	}
	// The nodes notice one after the other that they lack the key.
	c.Serve(t)
}

// SealAndUnseal seals all nodes and unseals them. It seals the active node with a
// request; the others accept none, so it restarts them.
func (c *Cluster) SealAndUnseal(t testing.TB) {
	t.Helper()
	active := c.Active(t)
	if err := active.Sys().Seal(); err != nil {
		t.Fatal(err)
	}
	for _, node := range c.Without(active).Nodes {
		node.Stop()
	}
	for _, node := range c.Without(active).Nodes {
		node.Start(t)
	}
	c.Serve(t)
}

// Serve unseals all sealed nodes, and waits until all serve.
func (c *Cluster) Serve(t testing.TB) {
	t.Helper()
	Eventually(t, "all nodes serve", func() error {
		for _, node := range c.Nodes {
			if node.Sealed(t) {
				if _, err := node.Sys().Unseal(node.unsealKey); err != nil {
					return err
				}
			}
		}
		if _, err := c.Agreed(); err != nil {
			return err
		}
		for _, node := range c.Nodes {
			if _, err := node.Auth().Token().LookupSelf(); err != nil {
				return err
			}
		}
		return nil
	})
}

// disk returns the directory of a node's storage.
func (v *Vault) disk() string { return filepath.Join(v.Dir, "raft") }

// mountDisk mounts a small disk at dir, if this process may.
func mountDisk(t testing.TB, dir string) {
	t.Helper()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d,mode=0700", diskSize), "tmpfs", dir).CombinedOutput(); err != nil {
		t.Logf("cannot mount a separate disk at %s: %v: %s", dir, err, out)
		return
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
}

// HasDisks reports whether the nodes' storage is on separate disks.
func (c *Cluster) HasDisks(t testing.TB) bool {
	t.Helper()
	var own, parent syscall.Stat_t
	node := c.Nodes[0]
	if err := errors.Join(syscall.Stat(node.disk(), &own), syscall.Stat(node.Dir, &parent)); err != nil {
		t.Fatal(err)
	}
	return own.Dev != parent.Dev
}

// FillDisk fills a node's disk, which must be a separate one. free frees the space.
func (v *Vault) FillDisk(t testing.TB) (free func()) {
	t.Helper()
	junk := filepath.Join(v.disk(), "junk")
	file, err := os.Create(junk)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	block := make([]byte, 1<<20)
	for len(block) > 0 {
		if _, err := file.Write(block); err != nil {
			if !errors.Is(err, syscall.ENOSPC) {
				t.Fatal(err)
			}
			block = block[:len(block)/2] // to the last byte
		}
	}
	return func() {
		if err := os.Remove(junk); err != nil {
			t.Error(err)
		}
	}
}

// Snapshot saves everything the cluster has stored to a file.
func (c *Cluster) Snapshot(t testing.TB) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "vault.snap")
	file, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if err := c.Active(t).Sys().RaftSnapshot(file); err != nil {
		t.Fatal(err)
	}
	return path
}

// Sealed reports whether the server is sealed.
func (v *Vault) Sealed(t testing.TB) bool {
	t.Helper()
	status, err := v.Sys().SealStatus()
	if err != nil {
		t.Fatal(err)
	}
	return status.Sealed
}

// logTail returns the end of the server's log.
func (v *Vault) logTail(t testing.TB) string {
	lines := strings.SplitAfter(v.Log(t), "\n")
	return strings.Join(lines[max(0, len(lines)-80):], "")
}
