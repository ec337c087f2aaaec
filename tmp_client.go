package mojoauth

const classExpiredOnArrival errorClass = "expired_on_arrival"

func (e *mintError) withoutDescription() *mintError {
	brief := *e
	brief.description = ""
	return &brief
}
