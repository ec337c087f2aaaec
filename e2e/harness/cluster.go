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

// Cluster is a Vault or an OpenBao of several nodes on integrated storage, with TLS between them and
// to them.
type Cluster struct {
	Nodes []*Vault
}

// diskSize is enough for what a node stores in the longest test, and little enough to
// be filled up.
const diskSize = 192 << 20

// StartCluster starts a cluster with an empty storage. Each node's storage is a disk
// of its own, if this process may mount one.
func StartCluster(t testing.TB, binary, pluginDir string, nodes int) *Cluster {
	t.Helper()
	return startCluster(t, binary, pluginDir, nodes, time.Second)
}

// NoticeDeath is how long the nodes of a patient cluster do without an active one before
// they elect another.
const NoticeDeath = 5 * time.Second

// StartPatientCluster is StartCluster for a test beside others, which take the machine's
// time.
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
				t.Logf("the end of the log of node %d, %s:\n%s", i, node.address, node.logTail(t))
			}
		}
	})

	first := c.Nodes[0]
	first.initialize(t)
	first.Unseal(t)
	// Else a node has no vote in its first ten seconds.
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

// Without is the cluster without a node.
func (c *Cluster) Without(node *Vault) *Cluster {
	return &Cluster{Nodes: slices.DeleteFunc(slices.Clone(c.Nodes), func(other *Vault) bool { return other == node })}
}

// Agreed is the active node, once it says so itself and all nodes that are unsealed
// know it. Until then there is an error.
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
			return nil, fmt.Errorf("%s takes %q for the active node, another takes %q", node.address, leader.LeaderAddress, address)
		}
		address = leader.LeaderAddress
	}
	if active == nil || active.address != address {
		return nil, fmt.Errorf("the nodes take %q for active, and it is not", address)
	}
	return active, nil
}

// Active waits until the nodes agree on the active one.
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

// StepDown has the active node step down, and waits until another one is active.
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

// Activations is how often a node of the cluster has started the plugin: as the active
// one, and in OpenBao as a standby too (StandbysRead).
func (c *Cluster) Activations(t testing.TB) int {
	t.Helper()
	n := 0
	for _, node := range c.Nodes {
		n += strings.Count(node.Log(t), "core: post-unseal setup complete")
	}
	return n
}

// Restart starts a node again that has ended, and unseals it.
func (c *Cluster) Restart(t testing.TB, node *Vault) {
	t.Helper()
	node.Start(t)
	node.Unseal(t)
}

// Restore puts a snapshot of another cluster in the place of all that this one has
// stored. Its keys and its root token are the other's from then on.
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
	// The nodes find out one after the other that they do not have the key.
	c.Serve(t)
}

// SealAndUnseal seals all nodes, the active one by a request and the others, which take
// none, by ending them and starting them again; and unseals all.
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

// Serve unseals the nodes that are sealed, until all serve.
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

// disk is where a node of a cluster keeps its storage.
func (v *Vault) disk() string { return filepath.Join(v.Dir, "raft") }

// mountDisk mounts a small disk at dir, if this process may.
func mountDisk(t testing.TB, dir string) {
	t.Helper()
	if out, err := exec.Command("mount", "-t", "tmpfs", "-o", fmt.Sprintf("size=%d,mode=0700", diskSize), "tmpfs", dir).CombinedOutput(); err != nil {
		t.Logf("no disk of its own for %s: %v: %s", dir, err, out)
		return
	}
	t.Cleanup(func() {
		if out, err := exec.Command("umount", dir).CombinedOutput(); err != nil {
			t.Errorf("umount: %v: %s", err, out)
		}
	})
}

// HasDisks tells whether the nodes' storages are disks of their own.
func (c *Cluster) HasDisks(t testing.TB) bool {
	t.Helper()
	var own, parent syscall.Stat_t
	node := c.Nodes[0]
	if err := errors.Join(syscall.Stat(node.disk(), &own), syscall.Stat(node.Dir, &parent)); err != nil {
		t.Fatal(err)
	}
	return own.Dev != parent.Dev
}

// FillDisk leaves no space on a node's disk, which has to be one of its own. free
// makes it again.
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

// Snapshot saves all that the cluster has stored to a file.
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

// Sealed tells whether the server is sealed.
func (v *Vault) Sealed(t testing.TB) bool {
	t.Helper()
	status, err := v.Sys().SealStatus()
	if err != nil {
		t.Fatal(err)
	}
	return status.Sealed
}

// logTail is the end of what the server has logged.
func (v *Vault) logTail(t testing.TB) string {
	lines := strings.SplitAfter(v.Log(t), "\n")
	return strings.Join(lines[max(0, len(lines)-80):], "")
}
