// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// This file limits how many slots there are for scope subsets.

const (
	// maxNarrowed limits a mount's slots for scope subsets, so no caller can grow memory.
	// maxNarrowedOfRole limits those of one role, so a caller that goes through its
	// subsets evicts few slots of other roles.
	maxNarrowed       = 1024
	maxNarrowedOfRole = 128
)

// narrowedSlots records the order in which the slots for scope subsets were last read.
type narrowedSlots struct {
	mu    sync.Mutex // never held across I/O
	mount *simplelru.LRU[slotKey, *slot]
	roles map[string]*simplelru.LRU[slotKey, *slot]
}

func newNarrowedSlots() narrowedSlots {
	return narrowedSlots{mount: newLRU(maxNarrowed + 1), roles: make(map[string]*simplelru.LRU[slotKey, *slot])}
}

// newLRU returns a list that does not evict on its own while it holds at most size slots.
func newLRU(size int) *simplelru.LRU[slotKey, *slot] {
	list, err := simplelru.NewLRU[slotKey, *slot](size, nil)
	if err != nil {
		panic(err) // only if size is below 1
	}
	return list
}

// use marks s as the most recently read and returns the slot to evict for it: the least
// recently read one of the role if the role is at its limit, otherwise of the mount.
func (n *narrowedSlots) use(s *slot) (evicted *slot) {
	n.mu.Lock()
	defer n.mu.Unlock()
	of := n.roles[s.key.role]
	if of == nil {
		of = newLRU(maxNarrowedOfRole + 1)
		n.roles[s.key.role] = of
	}
	of.Add(s.key, s)
	n.mount.Add(s.key, s)
	switch {
	case of.Len() > maxNarrowedOfRole:
		_, evicted, _ = of.GetOldest()
	case n.mount.Len() > maxNarrowed:
		_, evicted, _ = n.mount.GetOldest()
	default:
		return nil
	}
	n.take(evicted)
	return evicted
}

// remove forgets a freed slot.
func (n *narrowedSlots) remove(s *slot) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if listed, ok := n.mount.Peek(s.key); ok && listed == s {
		n.take(s)
	}
}

// take removes a slot from the lists. The caller holds n.mu.
func (n *narrowedSlots) take(s *slot) {
	n.mount.Remove(s.key)
	of := n.roles[s.key.role]
	of.Remove(s.key)
	if of.Len() == 0 {
		delete(n.roles, s.key.role)
	}
}

// has reports whether s is kept.
func (n *narrowedSlots) has(s *slot) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	listed, ok := n.mount.Peek(s.key)
	return ok && listed == s
}
