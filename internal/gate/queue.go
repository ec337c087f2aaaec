// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package gate

import (
	"container/heap"
	"time"
)

// This file decides whose turn is next: order and shares of the turns that wait, without
// a clock or a lock.

const (
	// maxPlaces is the highest number of places that wait.
	maxPlaces = 10_000

	// Of the requests that leave while others wait, at most every urgentShare-th is a
	// rotation or verification, and at most every narrowedShare-th is for a scope subset.
	// So no one can hold up the others by asking often.
	urgentShare   = 4
	narrowedShare = 2
)

// Kind is what a turn is for.
type Kind int

// The kinds of turns. The turns of one role and one kind share a place.
const (
	Whole        Kind = iota // a token for all scopes of a role
	Narrowed                 // a token for a scope subset of a role
	Rotation                 // a token that replaces the role's current one
	Verification             // a check of a config that is being written
)

// line is what a place waits in. The most urgent place of a line is its first.
type line int

const (
	wholeLine line = iota
	narrowedLine
	urgentLine
	lines
)

func (k Kind) line() line {
	switch k {
	case Narrowed:
		return narrowedLine
	case Rotation, Verification:
		return urgentLine
	default:
		return wholeLine
	}
}

type placeKey struct {
	role string
	kind Kind
}

// place is where the turns of one role and one kind wait. They also take turns within it:
// when one leaves, the others queue up again, so a role with many scope subsets gets no
// more than a role with one.
type place struct {
	key    placeKey
	turns  ordered[*Turn]
	turned time.Time // when the last one left
	out    *Turn     // the rotation in flight
	since  time.Time // when waiting began to hurt: the place's rank in its line

	inLine, inAll int // indexes, -1 if not in there
}

// update recalculates the rank. The first turn must not be nil.
func (p *place) update() {
	first := p.turns.first()
	if first.rank.IsZero() {
		p.since = latest(first.hurts, p.turned)
	} else {
		p.since = first.rank
	}
}

func moreUrgent(p, q *place) bool {
	if pu, qu := p.key.kind.line() == urgentLine, q.key.kind.line() == urgentLine; pu != qu {
		return pu
	}
	if !p.since.Equal(q.since) {
		return p.since.Before(q.since)
	}
	return p.turns.first().number < q.turns.first().number
}

// goesBefore is the order of the turns in a place. Those that left before and came back
// are first.
func (t *Turn) goesBefore(u *Turn) bool {
	switch {
	case t.rank.IsZero() != u.rank.IsZero():
		return u.rank.IsZero()
	case !t.rank.Equal(u.rank):
		return t.rank.Before(u.rank)
	case !t.hurts.Equal(u.hurts):
		return t.hurts.Before(u.hurts)
	default:
		return t.number < u.number
	}
}

// queue holds the turns that wait.
type queue struct {
	places map[placeKey]*place
	lines  [lines]ordered[*place] // those whose turn it may be
	all    ordered[*place]        // those with a turn that waits, least urgent first
	turns  int                    // that wait

	sinceUrgent, sinceNarrowed int // requests that have left since the last one of the kind
}

func newQueue() queue {
	q := queue{
		places:        make(map[placeKey]*place),
		all:           ordered[*place]{before: func(p, q *place) bool { return moreUrgent(q, p) }, index: func(p *place) *int { return &p.inAll }},
		sinceUrgent:   urgentShare,
		sinceNarrowed: narrowedShare,
	}
	for l := range q.lines {
		q.lines[l] = ordered[*place]{before: moreUrgent, index: func(p *place) *int { return &p.inLine }}
	}
	return q
}

// add puts t into its place to wait.
func (q *queue) add(t *Turn) {
	p := q.places[t.key]
	if p == nil {
		p = &place{key: t.key, inLine: -1, inAll: -1}
		p.turns = ordered[*Turn]{before: (*Turn).goesBefore, index: func(t *Turn) *int { return &t.inPlace }}
		q.places[t.key] = p
	}
	t.place = p
	p.turns.set(t, true)
	q.turns++
	q.update(p)
}

// remove takes t out of the queue.
func (q *queue) remove(t *Turn) {
	t.place.turns.set(t, false)
	q.turns--
	q.update(t.place)
}

// raised must be called when t has become more urgent.
func (q *queue) raised(t *Turn) {
	t.place.turns.set(t, true)
	q.update(t.place)
}

// update moves p to where it belongs.
func (q *queue) update(p *place) {
	waits := p.turns.Len() > 0
	if waits {
		p.update()
	}
	q.lines[p.key.kind.line()].set(p, waits && p.out == nil)
	q.all.set(p, waits)
	if !waits && p.out == nil {
		delete(q.places, p.key)
	}
}

// overflow returns the least urgent place if too many wait, or nil.
func (q *queue) overflow() *place {
	if q.all.Len() <= maxPlaces {
		return nil
	}
	return q.all.first()
}

// next returns the turn that comes next, or nil.
func (q *queue) next() *Turn {
	p := q.nextPlace()
	if p == nil {
		return nil
	}
	return p.turns.first()
}

func (q *queue) nextPlace() *place {
	urgent, whole, narrowed := q.lines[urgentLine].first(), q.lines[wholeLine].first(), q.lines[narrowedLine].first()
	switch {
	case urgent != nil && (q.sinceUrgent >= urgentShare-1 || whole == nil && narrowed == nil):
		return urgent
	case whole == nil:
		return narrowed
	case narrowed != nil && q.sinceNarrowed >= narrowedShare-1 && moreUrgent(narrowed, whole):
		return narrowed
	default:
		return whole
	}
}

// demand is how urgently those that wait need their turn.
func (q *queue) demand(now time.Time) demand {
	d := demand{waiting: q.turns}
	for l := range q.lines {
		if p := q.lines[l].first(); p != nil && !p.since.After(now) {
			d.hurts = true
		}
	}
	return d
}

// leave takes t, which must be next, out of the queue: its request leaves now.
func (q *queue) leave(t *Turn, now time.Time) {
	p := t.place
	t.rank = p.since
	p.turned = now
	if p.key.kind == Rotation {
		p.out = t
	}
	q.remove(t)

	q.sinceUrgent++
	q.sinceNarrowed++
	switch p.key.kind.line() {
	case urgentLine:
		q.sinceUrgent = 0
	case narrowedLine:
		q.sinceNarrowed = 0
	}
}

// landed must be called when the request of t has been answered.
func (q *queue) landed(t *Turn) {
	if p := t.place; p.out == t {
		p.out = nil
		q.update(p)
	}
}

// ordered is a heap whose elements know their index, which is -1 outside of it.
type ordered[T any] struct {
	items  []T
	before func(a, b T) bool
	index  func(T) *int
}

// first returns the first element, or the zero value.
func (o *ordered[T]) first() (first T) {
	if len(o.items) > 0 {
		first = o.items[0]
	}
	return first
}

// set inserts x, removes it, or moves it after its order has changed.
func (o *ordered[T]) set(x T, in bool) {
	switch i := *o.index(x); {
	case i < 0 && in:
		heap.Push(o, x)
	case i >= 0 && in:
		heap.Fix(o, i)
	case i >= 0:
		heap.Remove(o, i)
	}
}

func (o *ordered[T]) Len() int           { return len(o.items) }
func (o *ordered[T]) Less(i, j int) bool { return o.before(o.items[i], o.items[j]) }

func (o *ordered[T]) Swap(i, j int) {
	o.items[i], o.items[j] = o.items[j], o.items[i]
	*o.index(o.items[i]), *o.index(o.items[j]) = i, j
}

func (o *ordered[T]) Push(x any) {
	*o.index(x.(T)) = len(o.items)
	o.items = append(o.items, x.(T))
}

func (o *ordered[T]) Pop() any {
	last := len(o.items) - 1
	x := o.items[last]
	*o.index(x) = -1
	clear(o.items[last:])
	o.items = o.items[:last]
	return x
}
