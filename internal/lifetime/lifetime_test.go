// Copyright (c) The vault-plugin-secrets-mojoauth authors
// SPDX-License-Identifier: MPL-2.0

package lifetime

import (
	"encoding/base64"
	"fmt"
	"testing"
	"testing/quick"
	"time"
)

func TestScheduleFollowsFromLifetimeAndMinTTL(t *testing.T) {
	const day = 24 * time.Hour
	cases := []struct {
		lifetime, minTTL       time.Duration
		floor, margin, refresh time.Duration
	}{
		{5 * time.Second, 0, 500 * time.Millisecond, 500 * time.Millisecond, 1250 * time.Millisecond},
		{20 * time.Second, 0, 2 * time.Second, 2 * time.Second, 5 * time.Second},
		{time.Minute, 0, 6 * time.Second, 6 * time.Second, 15 * time.Second},
		{5 * time.Minute, 0, 30 * time.Second, 30 * time.Second, 75 * time.Second},
		{10 * time.Minute, 0, time.Minute, time.Minute, 150 * time.Second},
		{time.Hour, 0, time.Minute, 5 * time.Minute, 15 * time.Minute},
		{day, 0, time.Minute, 5 * time.Minute, 6 * time.Hour},
		{30 * day, 0, time.Minute, 5 * time.Minute, 180 * time.Hour},
		{time.Hour, 10 * time.Minute, time.Minute, 5 * time.Minute, 15 * time.Minute}, // below L/4: no effect
		{time.Hour, 20 * time.Minute, time.Minute, 5 * time.Minute, 20 * time.Minute},
		{time.Hour, 48 * time.Minute, time.Minute, 5 * time.Minute, 48 * time.Minute},
		{time.Hour, 2 * time.Hour, time.Minute, 5 * time.Minute, 48 * time.Minute}, // 0.8 L at most
	}
	for _, c := range cases {
		got := New(c.lifetime, c.minTTL)
		want := Schedule{c.lifetime, c.floor, c.margin, c.refresh}
		if got != want {
			t.Errorf("L %s, min_ttl %s: got %+v, want %+v", c.lifetime, c.minTTL, got, want)
		}
	}
}

func TestSchedulePhaseAtItsBoundaries(t *testing.T) {
	for _, lifetime := range []time.Duration{5 * time.Second, 20 * time.Second, time.Minute, 5 * time.Minute, time.Hour, 24 * time.Hour, 720 * time.Hour} {
		s := New(lifetime, 0)
		for left, want := range map[time.Duration]Phase{
			lifetime:      Fresh,
			s.Refresh + 1: Fresh,
			s.Refresh:     Due,
			s.Floor + 1:   Due,
			s.Floor:       Spent,
			0:             Spent,
			-time.Second:  Spent,
		} {
			if got := s.Phase(left); got != want {
				t.Errorf("L %s, %s left: got phase %v, want %v", lifetime, left, got, want)
			}
		}
	}
}

func TestTTLLeadsToTheRefreshAndALeaseEndsBeforeTheToken(t *testing.T) {
	cases := []struct {
		lifetime, left time.Duration
		random         float64
		ttl, rotation  int64
		lease          time.Duration
	}{
		{time.Hour, time.Hour, 0, 2700, 2700, 55 * time.Minute},
		{time.Hour, time.Hour, 0.5, 2850, 2700, 55 * time.Minute}, // J = 5 min
		{time.Hour, 16 * time.Minute, 0, 60, 2700, 11 * time.Minute},
		{20 * time.Second, 20 * time.Second, 0, 15, 15, 18 * time.Second},
		{20 * time.Second, 5500 * time.Millisecond, 0, 1, 15, 3500 * time.Millisecond}, // never below 1
		{5 * time.Second, 5 * time.Second, 0.999, 4, 3, 4500 * time.Millisecond},
		{time.Second, time.Second, 0, 1, 1, time.Second},
	}
	for _, c := range cases {
		s := New(c.lifetime, 0)
		if got := s.TTL(c.left, c.random); got != c.ttl {
			t.Errorf("L %s, %s left, random %v: got ttl %d, want %d", c.lifetime, c.left, c.random, got, c.ttl)
		}
		if got := s.RotationPeriod(); got != c.rotation {
			t.Errorf("L %s: got rotation_period %d, want %d", c.lifetime, got, c.rotation)
		}
		if got := s.Lease(c.left); got != c.lease {
			t.Errorf("L %s, %s left: got lease %s, want %s", c.lifetime, c.left, got, c.lease)
		}
	}
}

func TestStaleWaitIsAtMostHalfOfTheTimeLeft(t *testing.T) {
	cases := []struct {
		left   time.Duration
		random float64
		want   time.Duration
	}{
		{time.Hour, 0, 30 * time.Second},
		{time.Hour, 0.5, 45 * time.Second},
		{50 * time.Second, 0, 25 * time.Second},
		{3 * time.Second, 0.9, 1500 * time.Millisecond},
		{time.Second, 0, time.Second},
	}
	for _, c := range cases {
		if got := StaleWait(c.left, c.random); got != c.want {
			t.Errorf("%s left, random %v: got %s, want %s", c.left, c.random, got, c.want)
		}
	}
}

// Rules that hold for every lifetime, setting and moment.
func TestScheduleRulesHoldForAnyLifetime(t *testing.T) {
	holds := func(lifetimeMS, minMS, maxMS, leftMS uint32, random uint16) bool {
		ms := func(n uint32, most time.Duration) time.Duration {
			return time.Duration(n) * time.Millisecond % (most + 1)
		}
		reported := ms(lifetimeMS, 40*24*time.Hour)
		maxTTL := ms(maxMS, 24*time.Hour)
		lifetime := Effective(reported, maxTTL)
		s := New(lifetime, ms(minMS, 24*time.Hour))
		left := ms(leftMS, lifetime)
		rnd := float64(random) / (1 << 16)

		if left <= s.Floor && s.Phase(left) != Spent {
			t.Logf("a token with %s left of %s would be served", left, lifetime)
			return false
		}
		if s.Refresh >= s.Lifetime || s.Refresh <= s.Floor {
			t.Logf("R %s is not between F %s and L %s", s.Refresh, s.Floor, s.Lifetime)
			return false
		}
		if s.Phase(left) == Spent {
			return true
		}
		stale := StaleWait(left, rnd)
		for _, ttl := range []int64{s.TTL(left, rnd), s.RotationPeriod(), WholeSeconds(stale)} {
			if ttl < 1 {
				t.Logf("L %s, %s left: ttl %d", lifetime, left, ttl)
				return false
			}
		}
		for _, lease := range []time.Duration{s.Lease(left), stale} {
			// A lease cannot be a second long and at the same time shorter than a second.
			if lease < time.Second || left > time.Second && lease >= left {
				t.Logf("L %s, %s left: lease %s", lifetime, left, lease)
				return false
			}
		}
		// A reader that follows the ttl of a fresh token comes back before the floor.
		if ttl := time.Duration(s.TTL(left, rnd)) * time.Second; s.Phase(left) == Fresh && lifetime >= 5*time.Second && left-ttl <= s.Floor && ttl > time.Second {
			t.Logf("L %s, %s left: ttl %s leads below the floor %s", lifetime, left, ttl, s.Floor)
			return false
		}
		return true
	}
	if err := quick.Check(holds, &quick.Config{MaxCount: 200_000}); err != nil {
		t.Error(err)
	}
}

func jwt(claims string) string {
	enc := base64.RawURLEncoding.EncodeToString
	return enc([]byte(`{"alg":"RS256"}`)) + "." + enc([]byte(claims)) + "." + enc([]byte("signature"))
}

func TestReportedLifetimeIsTheShorterOfBoth(t *testing.T) {
	minted := time.Unix(1_800_000_000, 0)
	exp := func(d time.Duration) string { return jwt(fmt.Sprintf(`{"exp":%d}`, minted.Add(d).Unix())) }
	cases := []struct {
		name      string
		expiresIn time.Duration
		token     string
		want      time.Duration
	}{
		{"opaque", time.Hour, "opaque", time.Hour},
		{"no lifetime", 0, "opaque", 0},
		{"JWT alone", 0, exp(time.Hour), time.Hour},
		{"JWT expires sooner", time.Hour, exp(time.Minute), time.Minute},
		{"JWT expires later", time.Minute, exp(time.Hour), time.Minute},
		{"JWT has expired", time.Hour, exp(-time.Second), -1},
		{"JWT expires now", time.Hour, exp(0), -1},
		{"JWT with negative exp", time.Hour, jwt(`{"exp":-5}`), -1},
		{"JWT with a fraction", 0, jwt(`{"exp":1800000000.5}`), time.Second / 2},
		{"JWT without exp", time.Hour, jwt(`{"iat":1}`), time.Hour},
		{"JWT with exp as text", time.Hour, jwt(`{"exp":"1"}`), time.Hour},
		{"JWT in milliseconds", 0, jwt(`{"exp":1800000000000}`), Longest},
		{"JWT beyond time's range", time.Hour, jwt(`{"exp":1e300}`), time.Hour},
		{"JWT broken", time.Hour, "a.!.c", time.Hour},
		{"JWE", time.Hour, "a.b.c.d.e", time.Hour},
		{"longer than a year", 2 * Longest, "opaque", Longest},
	}
	for _, c := range cases {
		if got := Reported(c.expiresIn, c.token, minted); got != c.want {
			t.Errorf("%s: got %s, want %s", c.name, got, c.want)
		}
	}
}

func TestMaxTTLCapsALifetimeAndStandsInForOne(t *testing.T) {
	for _, c := range []struct{ reported, maxTTL, want time.Duration }{
		{time.Hour, 0, time.Hour},
		{time.Hour, time.Minute, time.Minute},
		{time.Minute, time.Hour, time.Minute},
		{0, time.Hour, time.Hour},
		{0, 0, 5 * time.Minute},
		{0, 2 * Longest, Longest},
	} {
		if got := Effective(c.reported, c.maxTTL); got != c.want {
			t.Errorf("lifetime %s, max_ttl %s: got %s, want %s", c.reported, c.maxTTL, got, c.want)
		}
	}
}
