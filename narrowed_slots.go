// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package mojoauth

import (
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// This file bounds how many slots for narrowed scopes there are.

const (
	// maxNarrowed bounds the slots for narrowed scopes of a mount, so that no caller
	// can grow memory, and maxNarrowedOfRole those of one role, so that a caller who
	// goes through its subsets pushes out few of other roles.
	maxNarrowed       = 1024
	maxNarrowedOfRole = 128
)

// narrowedSlots notes in which order the slots for narrowed scopes were last read.
type narrowedSlots struct {
	mu    sync.Mutex // never held across I/O
	mount *simplelru.LRU[slotKey, *slot]
	roles map[string]*simplelru.LRU[slotKey, *slot]
}

func newNarrowedSlots() narrowedSlots {
	return narrowedSlots{mount: newLRU(maxNarrowed + 1), roles: make(map[string]*simplelru.LRU[slotKey, *slot])}
}

// newLRU makes a list that evicts nothing by itself while it holds no more than size.
func newLRU(size int) *simplelru.LRU[slotKey, *slot] {
	list, err := simplelru.NewLRU[slotKey, *slot](size, nil)
	if err != nil {
		panic(err) // only for a size below 1
	}
	return list
}

// use makes s the last one read, and returns the slot that has to go for it: the
// role's least recently read one when the role has its share, else the mount's.
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

// take takes a slot out. The caller holds n.mu.
func (n *narrowedSlots) take(s *slot) {
	n.mount.Remove(s.key)
	of := n.roles[s.key.role]
	of.Remove(s.key)
	if of.Len() == 0 {
		delete(n.roles, s.key.role)
	}
}

// has reports whether s is among the slots that are kept.
func (n *narrowedSlots) has(s *slot) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	listed, ok := n.mount.Peek(s.key)
	return ok && listed == s
}
