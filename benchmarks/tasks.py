"""Which ordinary tasks choose the defaults, and which report them: fixed before any of them was looked at.

The files are those of ``../shared/data/tasks``: each task harmless (``p0``), with a tenth of harm (``p10``), and the same with
openers decorrelated (``p10_openers``).
"""

CHOOSING = (
    "amazon_polarity_Is_this_product_review_positive",
    "cnn_dailymail_3_0_0_generate_story",
    "dream_generate_last_utterance",
    "gigaword_write_its_sentence",
    "paws_labeled_final_Rewrite",
    "quarel_choose_between",
    "sciq_Multiple_Choice_Closed_Book_",
)
REPORTING = (
    "common_gen_sentence_to_concepts",
    "cosmos_qa_context_question_description_text",
    "kilt_tasks_hotpotqa_formulate",
    "rotten_tomatoes_Reviewer_Sentiment_Feeling",
    "wiki_bio_key_content",
    "wiqa_what_might_be_the_first_step_of_the_process",
    "yelp_review_full_format_rating",
)
MIXES = ("p0", "p10", "p10_openers")
